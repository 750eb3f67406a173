"""The inspector: explanations as one page; its parts are files beside this one."""
