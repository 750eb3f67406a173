"""``bdlora run``: answer prompts with the base model and with every adapter."""

from enum import StrEnum
from typing import Annotated

import typer

from bdlora_compile.commands.common import StrategyName, check_model, checked_adapters, launch


class InnerName(StrEnum):
    """What runs a rank's graph."""

    eager = "eager"
    inductor = "inductor"


def run(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, or an id on the hub.")],
    prompt: Annotated[list[str], typer.Option(help="A question; give it several times for several rows.")],
    adapter: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help="A PEFT adapter's folder.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree: processes that are started.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each row.")] = 32,
    strategy: Annotated[
        StrategyName,
        typer.Option(help="local: no LoRA collective. slora: S-LoRA's collectives. auto: the cheaper of them."),
    ] = StrategyName.local,
    machine: Annotated[
        str | None, typer.Option(help="What it runs on: a known machine, or a file of bdlora calibrate.")
    ] = None,
    inner: Annotated[InnerName | None, typer.Option(help="Default: inductor on GPUs, eager on CPUs.")] = None,
    check: Annotated[bool, typer.Option(help="Compare every token with PEFT's eager result.")] = False,
) -> None:
    """Answer prompts with the base model and with every adapter, in one batch, on TP ranks.

    The processes are started here; on GPUs they talk through NCCL, on CPUs through gloo. The exit status is 1 when
    --check finds a token that differs.

    Example: bdlora run ./SmolLM2 --adapter pirate=examples/adapters/pirate --tp 3 --prompt "What is the sun?"
    """
    check_model(model)
    checked_adapters(adapter)
    arguments = [model, "--new-tokens", str(new_tokens), "--strategy", strategy.value]
    arguments += [part for text in prompt for part in ("--prompt", text)]
    arguments += [part for pair in adapter or [] for part in ("--adapter", pair)]
    arguments += ["--machine", machine] if machine else []
    arguments += ["--inner", inner.value] if inner else []
    arguments += ["--check"] if check else []
    raise typer.Exit(launch("bdlora_compile.decode", arguments, tp))
