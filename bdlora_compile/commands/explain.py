"""``bdlora explain``: what the compiler does to a model, without weights, GPUs or process groups."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bdlora_compile.commands.common import StrategyName, check_output, checked_adapters, refuse


def explain(
    model: Annotated[str | None, typer.Argument(help="A model folder; its weights are not read.")] = None,
    config: Annotated[
        str | None, typer.Option(help="In place of MODEL: a known name (llama-3.1-70b, ...) or a config.json.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree N.")] = 1,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="A PEFT adapter's folder; several are averaged.")
    ] = None,
    adapter_rank: Annotated[
        int | None, typer.Option(min=1, help="Without --adapter: rank of an adapter on every site (16).")
    ] = None,
    nblocks: Annotated[int, typer.Option(min=1, help="Its blocks along the dim that ranks split; 1: ordinary.")] = 1,
    target_module: Annotated[
        list[str] | None, typer.Option(help="Layer that adapters may change, like q_proj; all by default.")
    ] = None,
    strategy: Annotated[
        StrategyName, typer.Option(help="Layout of the LoRA sites; auto chooses the cheaper one of each group.")
    ] = StrategyName.local,
    batch: Annotated[int, typer.Option(min=1, help="Rows that decode together.")] = 16,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, and of a context in decode.")] = 1024,
    distinct_adapters: Annotated[
        int | None, typer.Option(min=1, help="Different adapters among the rows; by default one for each row.")
    ] = None,
    machine: Annotated[
        str, typer.Option(help="Constants of the estimates: a known machine, or a file of bdlora calibrate.")
    ] = "h100-nvlink",
    lenient: Annotated[bool, typer.Option("--lenient", help="Report gathers nobody asked for, do not refuse.")] = False,
    html: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write one page for a browser: graphs, bytes, reasons, plot.")
    ] = None,
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="Write everything, graphs too, to a file.")] = None,
) -> None:
    """Show passes, collectives, layouts and estimated times of a model on TP ranks. No weights, no GPU.

    Bytes and layouts are exact; times are estimates from the machine's constants and say what they leave out.

    A well-known model, block-diagonal adapters:

    \b
      bdlora explain --config llama-3.1-70b --tp 8 --adapter-rank 32 --nblocks 8 --html explained.html

    Ordinary adapters, the cheaper layout of each group of sites, many rows with few adapters:

    \b
      bdlora explain --config llama-3.1-8b --tp 2 --adapter-rank 64 --strategy auto
        --batch 64 --distinct-adapters 8

    Adapters of attention alone:

    \b
      bdlora explain --config llama-3.1-8b --tp 2 --target-module q_proj --target-module o_proj

    Your own model and adapter on a machine that you measured, kept as JSON:

    \b
      bdlora calibrate --tp 2 --out machine.json
      bdlora explain ./my-model --adapter law=./adapters/law --tp 2
        --machine machine.json --json explained.json
    """
    if (model is None) == (config is None):
        refuse(
            "bdlora explain: found " + ("neither" if model is None else "both") + " of MODEL and --config, expected one"
        )
    if model is not None and not Path(model).is_dir():
        refuse(f"{model}: found no such folder, expected a Hugging Face model folder; for a known name use --config")
    adapters = checked_adapters(adapter)
    check_output(html, "--html")
    check_output(json, "--json")
    from bdlora_compile.errors import BdloraError  # importing torch takes seconds
    from bdlora_compile.explaining import Load
    from bdlora_compile.explaining import explain as make

    console = Console()
    try:
        told = make(
            model or config or "",
            tp_size=tp,
            adapters=adapters,
            adapter_rank=adapter_rank,
            nblocks=nblocks,
            strategy=strategy.value,
            machine=machine,
            load=Load(batch, prompt_length, distinct_adapters),
            target_modules=target_module or None,
            strict=not lenient,
        )
    except BdloraError as error:
        refuse(f"error: {error}")
    # Wide enough for the tables where the output is no terminal.
    # Not through the console, which would wrap the tables where the output is no terminal.
    typer.echo(told.text(console.width if console.is_terminal else 160), nl=False)
    if html is not None:
        html.write_text(told.html(), encoding="utf-8")
        typer.echo(f"written to {html}")
    if json is not None:
        json.write_text(told.to_json())
        typer.echo(f"written to {json}")
