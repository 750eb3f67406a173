"""An explanation as tables on a console."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bdlora_compile.collective_cost import ways
from bdlora_compile.explanation import (
    ExplainedCollective,
    ExplainedEstimate,
    ExplainedGraph,
    ExplainedRefusal,
    ExplainedSite,
    ExplainedStage,
    Explanation,
)
from bdlora_compile.ir import Origin
from bdlora_compile.machine import Link, Machine
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.timing import Seconds

_OPERATORS = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}
_PHASES = {"prefill": "prefill (the prompts)", "decode": "decode (one token for each row)"}


_LOADS = {"run": "one token of one row", "foreign": "one forward with the inputs that were traced"}


def show(told: Explanation, console: Console) -> None:
    """Print the whole explanation."""
    _show_head(told, console)
    for graph in told.graphs:
        _show_stages(graph, console)
    for graph in told.graphs:
        _show_collectives(graph, console)
    if told.sites:
        _show_sites(told, console)
    if told.decisions:
        _show_decisions(told, console)
    if told.estimates:
        _show_estimates(told, console)


def _show_head(told: Explanation, console: Console) -> None:
    if told.kind != "explained":
        _show_head_of_run(told, console)
        return
    console.print(
        f"[bold]{escape(told.name)}[/bold]: {told.model}, {told.num_layers} layers, {told.dtype}, on ", end=""
    )
    console.print(f"{told.tp_size} ranks, strategy {told.strategy}")
    console.print(f"{told.batch} rows, prompts and contexts of {told.prompt_length:,} tokens, ", end="")
    console.print(f"{told.workload.adapters if told.workload else told.batch} distinct adapters in a step")
    for line in told.adapters:
        console.print(f"adapter {line}", markup=False)
    console.print(f"a rank holds {_size(told.weight_bytes)} of weights and {_size(told.adapter_bytes)} of one adapter")
    console.print(f"explained in {told.seconds:.0f} s without weights; times below the passes' own are estimates\n")


def _show_head_of_run(told: Explanation, console: Console) -> None:
    console.print(f"[bold]{escape(told.name)}[/bold] on {told.tp_size} ranks; numbers are of {_LOADS[told.kind]}")
    if told.ranks is not None:
        alone = "nobody to compare with" if told.ranks.size == 1 else f"all {told.ranks.size} ranks have the same graph"
        same = told.ranks.difference or alone
        console.print(f"written by rank {told.ranks.rank}: {same}", markup=False)
    console.print()


def _show_stages(graph: ExplainedGraph, console: Console) -> None:
    table = Table("pass", title=f"passes over {escape(_PHASES.get(graph.phase, graph.phase))}", title_justify="left")
    for name in ("nodes before", "after", "matches", "seconds", "base", "LoRA", "fallback"):
        table.add_column(name, justify="right")
    refusals: list[tuple[str, ExplainedRefusal]] = []
    for stage in (*graph.stages, *graph.base_only):
        counts = [sum(one.runs for one in stage.collectives if one.origin is origin) for origin in Origin]
        numbers = (stage.nodes_before, stage.nodes_after, stage.matches)
        table.add_row(stage.name, *map(str, numbers), f"{stage.seconds:.2f}", *map(str, counts))
        refusals += [(stage.name, refusal) for refusal in stage.refusals]
    console.print(table)
    console.print("base, LoRA and fallback (gathers that nobody asked for): collectives of a forward, all layers")
    for line in _refusal_lines(refusals):
        console.print(line, markup=False)
    console.print()


def _refusal_lines(refusals: Sequence[tuple[str, ExplainedRefusal]]) -> list[str]:
    places: dict[tuple[str, str], list[str]] = {}
    for name, refusal in refusals:
        places.setdefault((name, refusal.reason), []).append(refusal.where)
    return [
        f"{name} left {where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''}: {reason}"
        for (name, reason), where in places.items()
    ]


def _show_collectives(graph: ExplainedGraph, console: Console) -> None:
    title = f"collectives of {escape(_PHASES.get(graph.phase, graph.phase))}; bytes that a rank sends in a ring"
    table = Table("stage", "where", "for", "operator", "operand", title=title, title_justify="left")
    for name in ("a token", "a step", "times"):
        table.add_column(name, justify="right")
    start, end = _first_placed(graph), graph.stages[-1]
    for label, stage in (("before localize", start), ("at the end", end)):
        collectives = _folded(stage.collectives)
        for one in collectives:
            where = _layers_text(one.layers)
            what = f"LoRA {_site_name(one.site or '')}" if one.origin is Origin.LORA else one.origin.value
            operand = f"{one.dtype} [{', '.join(one.shape)}]"
            token = "" if one.wire_bytes_per_token is None else f"{one.wire_bytes_per_token:,}"
            sizes = (token, _count(one.wire_bytes), str(one.runs))
            table.add_row(label, where, what, _OPERATORS.get(one.kind, one.kind), escape(operand), *sizes)
        for layers in dict.fromkeys(tuple(one.layers) for one in collectives if one.layers):
            own = [one for one in collectives if tuple(one.layers) == layers]
            tokens = [one.wire_bytes_per_token for one in own if one.wire_bytes_per_token is not None]
            token = f"{sum(tokens):,}" if tokens else ""
            step = sum(one.wire_bytes or 0 for one in own)
            table.add_row(label, f"one of {_layers_text(layers)}", "", "", "", token, f"{step:,}", "")
        total = f"[bold]{_sent(collectives):,}[/bold]"
        runs = sum(one.runs for one in collectives)
        table.add_row(label, "a forward", "", "", "", "", total, str(runs), end_section=True)
    console.print(table)
    before, after = (_sent(stage.collectives) for stage in (start, end))
    console.print(f"a step sends {_size(before)} a rank before localize and {_size(after)} at the end\n")


def _folded(collectives: Iterable[ExplainedCollective]) -> list[ExplainedCollective]:
    """Those that differ in their layer alone as one; a graph whose layers were not deduplicated has each of them."""
    rows: dict[object, ExplainedCollective] = {}
    for one in collectives:
        inside = (_short(one.site or ""), _short(one.key)) if one.layers else (one.site, one.key)
        like = (one.kind, one.origin, tuple(one.shape), one.dtype, one.group_size, one.reason is None, *inside)
        before = rows.get(like)
        rows[like] = one if before is None else replace(one, layers=[*before.layers, *one.layers])
    return [*rows.values()]


def _site_name(site: str) -> str:
    """``o_proj`` of ``model.layers.0.self_attn.o_proj``, and of the parameter ``...o_proj.lora_B.default.weight``."""
    parts = site.split(".")
    of_factor = next((parts[at] for at in range(len(parts) - 1) if parts[at + 1].lower().startswith("lora_")), None)
    return of_factor or parts[-1]


def _first_placed(graph: ExplainedGraph) -> ExplainedStage:
    """The stage in which LoRA lies as S-LoRA has it: partitioned, or as the model's owner sharded it."""
    names = ("partition", "tag paths")
    return next((stage for name in names for stage in graph.stages if stage.name == name), graph.stages[0])


def _sent(collectives: Iterable[ExplainedCollective]) -> int:
    return sum(one.runs * (one.wire_bytes or 0) for one in collectives)


def _count(number: int | None) -> str:
    """A number that may be known to a run alone; totals leave such a one out."""
    return "by a run" if number is None else f"{number:,}"


def _show_sites(told: Explanation, console: Console) -> None:
    title = f"LoRA sites, on the rank that holds most of {told.tp_size}; bytes of one layer"
    table = Table("site", "role", "weight", "on a rank", "layout", "R", "A on a rank", "B on a rank", title=title)
    table.title_justify = "left"
    for name in ("layers", "weight bytes", "adapter bytes"):
        table.add_column(name, justify="right")
    for site in told.sites:
        table.add_row(*_site_row(site))
    console.print(table)
    console.print("A and B have their blocks stacked on the local rank; adapter bytes are of one adapter, a mean\n")


def _site_row(site: ExplainedSite) -> list[str]:
    held = _shape(site.local_weight) + (f", {site.copies} copies" if site.copies > 1 else "")
    return [
        _short(site.site),
        site.role,
        _shape(site.weight),
        held,
        site.layout.value,
        ", ".join(map(str, site.ranks)) or "none",
        _shape(site.local_a),
        _shape(site.local_b),
        str(site.layers),
        f"{site.weight_bytes:,}",
        f"{site.adapter_bytes:,}",
    ]


def _show_decisions(told: Explanation, console: Console) -> None:
    console.print("layouts, and why:")
    for decision in told.decisions:
        console.print(f"  {_short(decision.group)}: {decision.chosen.value}, {decision.why}", markup=False)
    console.print()


def _show_estimates(told: Explanation, console: Console) -> None:
    title = "estimated time of a step on one rank, microseconds"
    table = Table("step", "strategy", title=title, title_justify="left")
    for name in (
        "projections",
        "LoRA",
        "attention",
        "outside",
        "total",
        "LoRA: kernels",
        "launches",
        "latency",
        "wire",
        "hidden",
    ):
        table.add_column(name, justify="right")
    for one in told.estimates:
        table.add_row(one.phase, one.strategy, *_estimate_cells(one), end_section=one.strategy == "auto")
    console.print(table)
    machine = told.machine
    if machine is None:
        return
    console.print(f"machine {machine.name}: {machine.source}", markup=False)
    constants = (
        f"memory {machine.memory_bandwidth / 1e9:,.1f} GB/s, products {machine.flops / 1e12:,.2f} TFLOP/s, "
        f"a kernel {machine.launch * 1e6:.2f} us"
    )
    console.print(", ".join([constants, *_links(machine, told.tp_size)]))
    if told.is_extrapolated:
        console.print(
            f"collectives over {told.tp_size} ranks were not measured on it: their latency is extrapolated with the "
            "fourth root of the number of ranks, about as it grew from 2 to 4 H200"
        )
    console.print("not counted: norms, activation functions, rotary angles, sampling, the host")
    if told.tp_size > 1 and machine.symmetric:
        console.print(
            f"with up to {BY_TOKEN_LIMIT} tokens LoRA's collectives lie beside products: hidden is what is not seen of "
            "them; that its kernels lie there, too, is not taken off"
        )


def _links(machine: Machine, ranks: int) -> list[str]:
    """The collectives' constants in words."""
    if ranks == 1:
        return []
    names = {"one_shot": "one-shot", "two_shot": "two-shot", "all_reduce": "all-reduce"}
    texts = []
    for way in ways(machine, "all_reduce", ranks, is_sum=True):
        limit = f" to {way.largest:,} bytes" if way.largest is not None else ""
        texts.append(f"{names[way.kind]}{limit} {_link_text(way.link)}")
    return [*texts, f"all-gather {_link_text(machine.link('all_gather_into_tensor', ranks))}"]


def _link_text(link: Link) -> str:
    return f"{link.latency * 1e6:.1f} us + bytes / {link.bandwidth / 1e9:,.1f} GB/s"


def _estimate_cells(one: ExplainedEstimate) -> list[str]:
    seconds: Sequence[Seconds] = (one.projections, one.lora, one.attention, one.outside)
    lora = one.lora
    parts = [
        *(part.total for part in seconds),
        one.seconds,
        lora.kernels,
        lora.launches,
        lora.latency,
        lora.wire,
        lora.hidden,
    ]
    return [f"{part * 1e6:,.0f}" for part in parts]


def _layers_text(layers: Sequence[str]) -> str:
    """``layers 0-79``, ``layers 0, 2-5``, or where there is no layer."""
    if not layers:
        return "outside layers"
    numbers = [int(layer.rpartition(".")[2]) for layer in layers]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"layer{'s' if len(numbers) > 1 else ''} {text}"


def _short(path: str) -> str:
    """``self_attn.q_proj`` of ``model.layers.0.self_attn.q_proj``: the part inside a layer."""
    parts = path.split(".")
    inner = next((index for index, part in enumerate(parts) if part.isdecimal() or part == "*"), None)
    return path if inner is None else ".".join(parts[inner + 1 :])


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _size(count: int) -> str:
    amount = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:,.0f} {unit}" if unit == "bytes" else f"{amount:,.2f} {unit}"
