"""``python -m bdlora_compile`` is ``bdlora``."""

from bdlora_compile.cli import app

app(prog_name="bdlora")
