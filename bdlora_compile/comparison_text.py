"""A comparison as tables on a console."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bdlora_compile.comparing import Comparison, GraphChange

_SHOWN = 12
"""Keys of nodes listed for each kind of change; the page lists all."""


def show(found: Comparison, console: Console, *, only_comm: bool = False) -> None:
    """Print it; with ``only_comm`` collectives alone."""
    for phase in found.only:
        console.print(f"graph without a counterpart: {phase}", markup=False)
    for graph in found.graphs:
        _show_collectives(graph, console)
        if not only_comm:
            _show_stages(graph, console)
    if found.is_same:
        console.print("nothing differs")
    for violation in found.violations:
        console.print(f"[bold red]forbidden[/bold red]: {escape(violation)}")


def _show_collectives(graph: GraphChange, console: Console) -> None:
    title = f"collectives of {graph.phase}, {graph.variant}; runs in a forward, bytes that a rank sends"
    table = Table("", "collective", title=escape(title), title_justify="left")
    for name in ("before", "after", "bytes before", "after"):
        table.add_column(name, justify="right")
    for one in graph.collectives:
        mark, style = ("+", "green") if one.after > one.before else ("-", "red") if one.after < one.before else ("", "")
        if one.before == one.after and one.is_changed:
            mark, style = "~", "yellow"
        numbers = (one.before, one.after, one.wire_before, one.wire_after)
        table.add_row(mark, escape(one.what), *(f"{number:,}" for number in numbers), style=style)
    sums = [sum(getattr(one, name) for one in graph.collectives) for name in _NUMBERS]
    table.add_section()
    table.add_row("", "all", *(f"{number:,}" for number in sums))
    console.print(table)


_NUMBERS = ("before", "after", "wire_before", "wire_after")


def _show_stages(graph: GraphChange, console: Console) -> None:
    title = f"nodes of {graph.phase}, {graph.variant}, by stage"
    table = Table("stage", title=escape(title), title_justify="left")
    for name in ("added", "removed", "changed", "same"):
        table.add_column(name, justify="right")
    for stage in graph.stages:
        counts = (len(stage.added), len(stage.removed), len(stage.changed), stage.same)
        table.add_row(stage.stage, *map(str, counts))
    console.print(table)
    for name in graph.only:
        console.print(f"one of them has no stage {name}", markup=False)
    for stage in graph.stages[-1:]:
        for mark, keys in (("+", stage.added), ("-", stage.removed), ("~", stage.changed)):
            for key in keys[:_SHOWN]:
                console.print(f"  {mark} {key}", markup=False)
            if len(keys) > _SHOWN:
                console.print(f"  {mark} and {len(keys) - _SHOWN} more")
