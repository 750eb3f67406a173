"""The subcommands of ``bdlora``, one file each. Nothing here imports torch before a command runs: help is at once."""
