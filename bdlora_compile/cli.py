"""The command line: ``bdlora run``, ``bdlora adapters``."""

import sys
import uuid
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from bdlora_compile.commands import adapters

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.add_typer(adapters.app, name="adapters")


class StrategyName(StrEnum):
    """How LoRA factors lie on the ranks."""

    local = "local"
    slora = "slora"


class InnerName(StrEnum):
    """What runs a rank's graph."""

    eager = "eager"
    inductor = "inductor"


@app.callback()
def _group() -> None:
    """Serve one Llama with many LoRA adapters on many GPUs, through torch.compile."""


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, or an id on the hub.")],
    prompt: Annotated[list[str], typer.Option(help="A question; give it several times for several rows.")],
    adapter: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help="A PEFT adapter's folder.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree: processes that are started.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each row.")] = 32,
    strategy: Annotated[
        StrategyName, typer.Option(help="local: no LoRA collective. slora: S-LoRA's collectives, to compare with.")
    ] = StrategyName.local,
    inner: Annotated[InnerName | None, typer.Option(help="Default: inductor on GPUs, eager on CPUs.")] = None,
    check: Annotated[bool, typer.Option(help="Compare every token with PEFT's eager result.")] = False,
) -> None:
    """Answer prompts with the base model and with every adapter, in one batch, on TP ranks.

    The processes are started here; on GPUs they talk through NCCL, on CPUs through gloo. The exit status is 1 when
    --check finds a token that differs.

    Example: bdlora run ./SmolLM2 --adapter pirate=examples/adapters/pirate --tp 3 --prompt "What is the sun?"
    """
    _check_model(model)
    for pair in adapter or []:
        _check_adapter(pair)
    arguments = [model, "--new-tokens", str(new_tokens), "--strategy", strategy.value]
    arguments += [part for text in prompt for part in ("--prompt", text)]
    arguments += [part for pair in adapter or [] for part in ("--adapter", pair)]
    arguments += ["--inner", inner.value] if inner else []
    arguments += ["--check"] if check else []
    raise typer.Exit(launch(arguments, tp))


def launch(arguments: list[str], tp: int) -> int:
    """Run `bdlora_compile.decode` in ``tp`` processes, as torchrun does; returns the exit status of the first to fail.

    A process says itself what went wrong; the launcher's own trace of a failed child would hide it.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # importing torch takes seconds
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=tp,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "bdlora_compile.decode", *arguments)
    except ChildFailedError as error:
        return int(error.get_first_failure()[1].exitcode)
    return 0


def _check_model(model: str) -> None:
    """A path must be a folder; anything of the form ``name`` or ``owner/name`` may be on the hub."""
    looks_like_a_path = model.count("/") > 1 or model.startswith((".", "~", "/"))
    if looks_like_a_path and not Path(model).is_dir():
        _refuse(f"{model}: found no such folder, expected a Hugging Face model folder or an id on the hub")


def _refuse(message: str) -> NoReturn:
    Console(stderr=True).print(message, markup=False)
    raise typer.Exit(2)


def _check_adapter(pair: str) -> None:
    name, separator, path = pair.partition("=")
    if not separator or not name or not Path(path).is_dir():
        _refuse(
            f"--adapter {pair!r}: found {'no folder ' + path if separator else 'no ='}, expected NAME=PATH of a folder "
            "that PEFT's save_pretrained wrote; check the path"
        )
