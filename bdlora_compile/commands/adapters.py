"""``bdlora adapters``: look at an adapter, convert it to a block-diagonal one, merge it into a model."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bdlora_compile.new_folder import require_new

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bdlora_compile.adapter_conversion import Converted
    from bdlora_compile.adapter_inspection import Inspection, SiteFacts
    from bdlora_compile.plan import ModelPlan

app = typer.Typer(no_args_is_help=True, help=__doc__)

_MAX_PROBLEMS = 40


class StrategyName(StrEnum):
    """How LoRA factors lie on the ranks."""

    local = "local"
    slora = "slora"


Model = Annotated[str, typer.Option(help="The model it is for: a Hugging Face folder, or an id on the hub.")]
Path_ = Annotated[Path, typer.Argument(help="The folder that PEFT's save_pretrained wrote.")]


@app.command()
def inspect(
    path: Path_,
    model: Model,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree.")] = 1,
    strategy: Annotated[StrategyName, typer.Option(help="Layout of the LoRA sites.")] = StrategyName.local,
) -> None:
    """Show what an adapter is on TP ranks (sites, ranks, blocks, bytes, layouts and why), and all its problems.

    No weights of the model are read. The exit status is 1 if the adapter cannot be served.

    Example: bdlora adapters inspect examples/adapters/pirate --model ./SmolLM2 --tp 3
    """
    with _errors_said():
        from bdlora_compile.adapter_inspection import inspect_adapter, plan_for  # importing torch takes seconds
        from bdlora_compile.factors import Layout

        plan = plan_for(model, tp, Layout(strategy.value))
        found = inspect_adapter(path, plan, base_model=model)
    console = Console()
    _show_sites(found, plan, console)
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
    _show_problems(found, console)
    raise typer.Exit(1 if found.problems else 0)


@app.command()
def convert(
    path: Path_,
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    nblocks: Annotated[int, typer.Option(min=1, help="Blocks: the largest tensor-parallel degree to serve with.")],
    model: Annotated[str | None, typer.Option(help="The model it is for; the one that the adapter names.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the result; that of the adapter, rounded up to the blocks.")
    ] = None,
    max_error: Annotated[
        float, typer.Option(min=0, max=1, help="Relative error (Frobenius) of a site's change above which it stops.")
    ] = 0.3,
) -> None:
    """Write the block-diagonal adapter nearest to an ordinary one, in PEFT's format.

    Each site's change of the weight is approximated block by block by its largest singular values; the error of each
    is printed. An adapter that was not trained with blocks often loses much: --rank buys it back.

    Example: bdlora adapters convert adapters/math adapters/math-bd8 --nblocks 8 --rank 64
    """
    with _errors_said():
        # The end of the work finds it too late.
        require_new(out)
        from bdlora_compile.adapter_conversion import convert_adapter, write_adapter  # importing torch takes seconds
        from bdlora_compile.adapter_inspection import plan_for
        from bdlora_compile.errors import ConfigError
        from bdlora_compile.factors import Layout
        from bdlora_compile.runtime.adapter_config import read_config
        from bdlora_compile.runtime.adapter_file import read_adapter

        named = read_config(path / "adapter_config.json").get("base_model_name_or_path")
        base = model or (named if isinstance(named, str) else None)
        if not base:
            raise ConfigError("--model", found="none", expected="the model of the adapter", remedy="name it")
        sites = plan_for(base, 1, Layout.LOCAL).sites
        adapter = read_adapter(path, sites, base_model=base)
        console = Console()
        done: list[Converted] = []
        with _progress(console) as progress, adapter.opened():
            task = progress.add_task("converting", total=len(adapter.factors))

            def step(site: "Converted") -> None:
                done.append(site)
                progress.advance(task)

            try:
                convert_adapter(adapter, sites, nblocks, rank=rank, max_error=max_error, progress=step)
            finally:
                _show_errors(done, console)
        write_adapter(done, nblocks, named if isinstance(named, str) else base, out)
        said = _peft_reads(out, base)
    console.print(f"{out}: {len(done)} sites of rank {done[0].a.shape[0]} in {nblocks} blocks; {said}", markup=False)


@app.command()
def merge(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder.")],
    path: Path_,
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
) -> None:
    """Write the model with the adapter merged into its weights, file by file and piece by piece.

    Example: bdlora adapters merge ./SmolLM2 examples/adapters/pirate ./SmolLM2-pirate
    """
    with _errors_said():
        # The end of the work finds it too late.
        require_new(out)
        from bdlora_compile.adapter_inspection import plan_for  # importing torch takes seconds
        from bdlora_compile.adapter_merging import merge_adapter
        from bdlora_compile.factors import Layout
        from bdlora_compile.runtime.adapter_file import read_adapter

        sites = plan_for(model, 1, Layout.LOCAL).sites
        adapter = read_adapter(path, sites, base_model=str(model))
        console = Console()
        with _progress(console) as progress:
            task = progress.add_task("merging", total=len(adapter.factors))

            def step(name: str) -> None:
                progress.advance(task, name.removesuffix(".weight") in adapter.factors)

            merge_adapter(model, adapter, sites, out, step)
    console.print(f"{out}: {len(adapter.factors)} weights of {model} changed by {path}", markup=False)


@contextmanager
def _errors_said() -> Iterator[None]:
    """An error of ours in one line, and exit status 2."""
    from bdlora_compile.errors import BdloraError

    try:
        yield
    except (BdloraError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, style="red", soft_wrap=True)
        raise typer.Exit(2) from None


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


def _peft_reads(out: Path, base: str) -> str:
    """Let PEFT itself load the result on a model without weights; what to say of it."""
    try:
        from peft import PeftModel  # optional
    except ImportError:
        return "not checked by PEFT, which is not installed"
    import torch
    from transformers import AutoModelForCausalLM

    from bdlora_compile.model_config import read_model_config

    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(read_model_config(base))
    PeftModel.from_pretrained(hollow, str(out), low_cpu_mem_usage=True)
    return "PEFT loads it"


def _show_sites(found: "Inspection", plan: "ModelPlan", console: Console) -> None:
    from bdlora_compile.adapter_inspection import layer_pattern

    if not found.sites:
        return
    groups: dict[tuple[object, ...], list[SiteFacts]] = {}
    for facts in found.sites:
        alike = (layer_pattern(facts.site.name), facts.kind, facts.rank, facts.nblocks, facts.scaling, facts.reason)
        groups.setdefault(alike, []).append(facts)
    size = plan.dtype.itemsize
    table = Table(title=_title(found, plan))
    for column in ("site", "layers", "role", "stored", "r", "bytes/rank", "why"):
        table.add_column(column, no_wrap=column in ("site", "bytes/rank"))
    for (pattern, *_), alike_sites in groups.items():
        one = alike_sites[0]
        own = _range([elements * size * len(alike_sites) for elements in one.elements])
        blocks = f" in {one.nblocks} blocks" if one.nblocks > 1 else ""
        stored = f"R {one.rank}{blocks}, x {one.scaling:g}"
        name = str(pattern).rpartition(".*.")[2]
        table.add_row(
            name, str(len(alike_sites)), one.site.role.value, stored, _range(one.local_ranks), own, one.reason
        )
    console.print(table)
    total = [elements * size for elements in found.elements()]
    console.print(f"{len(found.sites)} sites, {_range(total)} bytes on a rank, {sum(total):,} on all")


def _title(found: "Inspection", plan: "ModelPlan") -> str:
    dtype, layout = str(plan.dtype).removeprefix("torch."), found.sites[0].layout.value
    return f"{found.source}: {layout} layout on {plan.mesh.size} ranks, {dtype} ({plan.model})"


def _range(numbers: "Sequence[int]") -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _show_problems(found: "Inspection", console: Console) -> None:
    if not found.problems:
        console.print("no problems: it can be served")
        return
    console.print(f"{len(found.problems)} problems:")
    for problem in found.problems[:_MAX_PROBLEMS]:
        console.print(f"  {problem}", markup=False, style="red", soft_wrap=True)
    if found.problems[_MAX_PROBLEMS:]:
        rest = Counter(problem.found for problem in found.problems[_MAX_PROBLEMS:])
        console.print(f"  and {rest.total()} more of {len(rest)} kinds")


def _show_errors(done: "Sequence[Converted]", console: Console) -> None:
    from bdlora_compile.adapter_conversion import total_error

    if not done:
        return
    table = Table("site", "relative error", "|change|", title="nearest block-diagonal factors")
    for one in done:
        table.add_row(one.site.name, f"{one.error:.4f}", f"{one.norm:.4g}")
    table.add_row("all sites together", f"{total_error(done):.4f}", "", style="bold")
    console.print(table)
