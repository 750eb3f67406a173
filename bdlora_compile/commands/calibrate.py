"""``bdlora calibrate``: measure the constants of the cost model on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from bdlora_compile.commands.common import check_output, launch


def calibrate(
    tp: Annotated[int, typer.Option(min=1, help="Ranks: processes that are started, one a GPU.")] = 2,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="File to write, for --machine and machine=.")] = None,
    name: Annotated[str | None, typer.Option(help="What reports call the machine; by default its processor.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer sizes and repetitions: seconds, and rougher.")] = False,
) -> None:
    """Measure memory, products, the cost of a kernel, and collectives over 2, 4, ... TP ranks (--tp 1 has none).

    Each collective is fitted as latency + bytes / bandwidth. On GPUs everything is measured inside CUDA graphs, on CPUs
    call by call; on GPUs of one machine also which all-reduces are faster through symmetric memory than through NCCL.
    Let nothing else run meanwhile.

    Example: bdlora calibrate --tp 2 --out machine.json && bdlora explain --config llama-3.1-8b --tp 2
    --machine machine.json --strategy auto
    """
    check_output(out, "--out")
    arguments = ["--out", str(out)] if out else []
    arguments += ["--name", name] if name else []
    arguments += ["--quick"] if quick else []
    raise typer.Exit(launch("bdlora_compile.calibrate", arguments, tp))
