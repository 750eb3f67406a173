"""The command line; each command has a file of its own in `commands/`."""

import typer

from bdlora_compile.commands import adapters
from bdlora_compile.commands.calibrate import calibrate
from bdlora_compile.commands.diff import diff
from bdlora_compile.commands.explain import explain
from bdlora_compile.commands.run import run
from bdlora_compile.commands.serve import serve

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.add_typer(adapters.app, name="adapters")


@app.callback()
def _group() -> None:
    """Serve one Llama with many LoRA adapters on many GPUs, through torch.compile."""


app.command()(run)
app.command()(serve)
app.command()(explain)
app.command()(diff)
app.command()(calibrate)
