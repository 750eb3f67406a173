"""Compare each LoRA site's role in the plan with its place in the graph, and change nothing.

    stream -> norm -> up (column) -> silu -> down (row) -> add -> stream

A plan that splits a layer on its outputs where the next one wants them whole would still be right, by gathers; it is
wrong all the same, and this says so by the layer's name instead of by a count of gathers.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from bdlora_compile.errors import PlacementError
from bdlora_compile.ir import Captured, Fact, record
from bdlora_compile.pass_manager import PassContext
from bdlora_compile.regions import is_boundary
from bdlora_compile.report import PassStats, Refusal
from bdlora_compile.roles import roles_between


@dataclass(frozen=True, slots=True)
class CheckRoles:
    """Roles of the plan against roles by dataflow."""

    name: ClassVar[str] = "check roles"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.TAGGED, Fact.DEDUPLICATED})
    establishes: ClassVar[frozenset[Fact]] = frozenset()

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        checked, refusals = 0, []
        for carried, nodes, result in _layers(captured):
            roles = roles_between(carried, nodes, result)
            for node in nodes:
                site = record(node).site
                if site is None:
                    continue
                planned, found = context.plan.sites[site].role, roles.get(node)
                if found is planned:
                    checked += 1
                    continue
                place = "neither begins nor ends a block" if found is None else f"is a {found.value} layer"
                refusals.append(Refusal(site, f"the plan has it as a {planned.value} layer; in the graph it {place}"))
        if refusals and context.strict:
            raise _strict_error(refusals)
        return PassStats(matches=checked, refusals=refusals)

    def verify(self, captured: Captured, context: PassContext) -> None:
        """Nothing: the pass looks only."""


def _layers(captured: Captured) -> list[tuple[Node, list[Node], Node]]:
    """(carried, calls, result) of each layer that the graph holds between boundaries."""
    found: list[tuple[Node, list[Node], Node]] = []
    carried, nodes = None, list[Node]()
    for node in captured.graph.nodes:
        if is_boundary(node):
            if carried is not None:
                result = node.args[0]
                assert isinstance(result, Node), f"{node.name}: a boundary carries a value of the graph"
                found.append((carried, nodes, result))
            carried, nodes = node, []
        else:
            nodes.append(node)
    return found


def _strict_error(refusals: list[Refusal]) -> PlacementError:
    first = refusals[0]
    more = f" and {len(refusals) - 1} more" if len(refusals) > 1 else ""
    return PlacementError(
        first.where + more,
        found=first.reason,
        expected="a plan that agrees with what feeds what",
        remedy="load with strict=False, which serves it by gathers where it must, and report the model",
    )
