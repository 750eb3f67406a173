"""What all passes share: checks before, verification after, a snapshot and statistics for the report."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch.fx import Graph, Node

from bdlora_compile.census import take_census
from bdlora_compile.errors import PassError
from bdlora_compile.ir import Captured, Fact
from bdlora_compile.nodes import view_graph
from bdlora_compile.plan import ModelPlan
from bdlora_compile.printer import print_graph
from bdlora_compile.propagation import Known, propagate
from bdlora_compile.report import PassStats, StageReport


@dataclass(frozen=True, slots=True)
class PassContext:
    """What a pass may read beside the graph.

    Attributes:
        plan: placements and layouts of the model.
        strict: whether a gather that nobody asked for is an error.
        known: what propagation has computed so far, for this graph and copies of it.
        has_views: whether the nodes of each stage are kept for the inspector.
    """

    plan: ModelPlan
    strict: bool
    known: Known = field(default_factory=dict, compare=False, repr=False)
    has_views: bool = False


class GraphPass(Protocol):
    """One rewrite of the graph. Its docstring shows before and after; its file holds it alone."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[Fact]]
    establishes: ClassVar[frozenset[Fact]]

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        """Change the graph in place and say what was done."""
        ...

    def verify(self, captured: Captured, context: PassContext) -> None:
        """Check what the pass establishes, after shapes were propagated.

        Raises:
            PassError: it does not hold.
        """
        ...


def run_passes(
    passes: Sequence[GraphPass], captured: Captured, context: PassContext, stages: list[StageReport]
) -> None:
    """Run passes in order, each with its requirements checked, its result verified, and a snapshot in ``stages``.

    Raises:
        PassError: a requirement is missing or a result does not verify.
    """
    for graph_pass in passes:
        stages.append(_run_pass(graph_pass, captured, context, stages))


def _run_pass(
    graph_pass: GraphPass, captured: Captured, context: PassContext, done: Sequence[StageReport]
) -> StageReport:
    _check_requirements(graph_pass, captured, done)
    start = time.perf_counter()
    nodes_before = len(captured.graph.nodes)
    before = _calls(captured.graph)
    stats = graph_pass.rewrite(captured, context)
    if _calls(captured.graph) != before:
        # Values of an unchanged graph still hold; a pass that only wrote records costs no propagation.
        captured.graph.lint()
        propagate(captured.graph, graph_pass.name, context.known)
    graph_pass.verify(captured, context)
    captured.facts |= graph_pass.establishes
    # First: it names the nodes that the census names.
    view = view_graph(captured) if context.has_views else None
    return StageReport(
        name=graph_pass.name,
        seconds=time.perf_counter() - start,
        nodes_before=nodes_before,
        nodes_after=len(captured.graph.nodes),
        stats=stats,
        census=take_census(captured, context.plan.mesh),
        text=print_graph(captured.graph),
        view=view,
    )


def _calls(graph: Graph) -> list[object]:
    """What decides the values of a graph's nodes."""
    return [(node, node.target, node.args, node.kwargs) for node in graph.nodes]


def _check_requirements(graph_pass: GraphPass, captured: Captured, done: Sequence[StageReport]) -> None:
    missing = sorted(fact.value for fact in graph_pass.requires - captured.facts)
    if missing:
        ran = ", ".join(stage.name for stage in done) or "none"
        raise PassError(
            f"pass {graph_pass.name}",
            found=f"a graph without {', '.join(missing)} (passes run: {ran})",
            expected=f"passes before it that establish {', '.join(missing)}",
            remedy="run the passes in the order of `pipeline.py`",
        )


def erase_unused(graph: Graph, candidates: Sequence[Node]) -> int:
    """Erase those of ``candidates`` that nothing uses any more, users before operands; returns how many.

    Only nodes that a pass has just orphaned may be named: writes (``index_put_``, ``add_``) have no users either.
    """
    erased = 0
    for node in sorted(candidates, reverse=True):
        if not node.users:
            graph.erase_node(node)
            erased += 1
    return erased


def erase_with_operands(graph: Graph, node: Node) -> None:
    """Erase a node that nothing uses, and then what only it used, and so on; placeholders stay."""
    pending, erased = [node], set[Node]()
    while pending:
        last = pending.pop()
        if last in erased or last.users or last.op == "placeholder":
            continue
        pending += last.all_input_nodes
        graph.erase_node(last)
        erased.add(last)
