"""Parts of the runtime alone."""
