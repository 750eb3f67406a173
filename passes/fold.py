"""Sum before communicating: two all-reduces that feed one addition become one.

    all_reduce(a) + all_reduce(b)           ->  all_reduce(a + b)
    all_reduce(a) + linear(all_reduce(z), B) ->  all_reduce(a + linear(z, B))      B replicated, without a bias

Both hold by linearity of the sum over ranks, for any a, b, z and B; no licence is needed. In a graph that this
compiler partitioned nothing is left to fold, since partial sums are added before they are reduced; in graphs that
others have sharded (Hugging Face tensor parallelism with PEFT's LoRA) it removes the adapters' all-reduces.
"""

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, Node

from bdlora_compile import collectives
from bdlora_compile.collectives import ALL_REDUCE, WAIT
from bdlora_compile.ir import Captured, Fact, fake_tensor, operator_name, record, set_record, stage_nodes
from bdlora_compile.pass_manager import PassContext, erase_unused
from bdlora_compile.placement import Mesh, Partial, Replicate
from bdlora_compile.report import PassStats


@dataclass(frozen=True, slots=True)
class Fold:
    """Merge all-reduces that feed one addition."""

    name: ClassVar[str] = "fold"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PARTITIONED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.FOLDED})

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        graph = captured.graph
        matches = sum(_fold(graph, node, context.plan.mesh) for node in list(stage_nodes(graph, "add")))
        return PassStats(matches=matches)

    def verify(self, captured: Captured, context: PassContext) -> None:
        """Nothing beyond shapes: a sum of sums is a sum."""


def _fold(graph: Graph, add: Node, mesh: Mesh) -> bool:
    if len(add.all_input_nodes) != 2 or add.kwargs:
        return False
    summands = [_summand(operand, add) for operand in add.args if isinstance(operand, Node)]
    if None in summands or fake_tensor(add.all_input_nodes[0]).shape != fake_tensor(add.all_input_nodes[1]).shape:
        return False
    orphans = _reductions_above(add)
    parts = []
    for operand, summand in zip(add.all_input_nodes, summands, strict=True):
        assert summand is not None, "checked above"
        parts.append(_rebuild(graph, operand, summand))
    with graph.inserting_before(add):
        partial = graph.call_function(operator.add, tuple(parts))
        reduced, result = collectives.all_reduce(graph, partial, mesh)
    for node, placement in ((partial, Partial()), (reduced, Replicate()), (result, Replicate())):
        node.meta["nn_module_stack"] = add.meta.get("nn_module_stack")
        set_record(node, placement=placement, origin=record(add).origin, stage="fold")
    add.replace_all_uses_with(result)
    erase_unused(graph, [add, *add.all_input_nodes, *orphans])
    return True


def _summand(value: Node, user: Node) -> Node | None:
    """The summand z of ``all_reduce(z)`` or ``linear(all_reduce(z), B)``, None for anything else."""
    if len(value.users) != 1:
        return None
    if operator_name(value) == "linear":
        x, weight = value.args[0], value.args[1]
        has_bias = len(value.all_input_nodes) > 2
        is_whole = isinstance(weight, Node) and isinstance(record(weight).placement, Replicate)
        return _summand(x, value) if isinstance(x, Node) and is_whole and not has_bias else None
    if operator_name(value) != WAIT:
        return None
    reduced = value.all_input_nodes[0]
    is_sum = operator_name(reduced) == ALL_REDUCE and reduced.args[1] == "sum" and len(reduced.users) == 1
    return reduced.all_input_nodes[0] if is_sum else None


def _reductions_above(add: Node) -> list[Node]:
    """The waits and all-reduces whose results the addition's operands are made of."""
    found: list[Node] = []
    for operand in add.all_input_nodes:
        wait = operand if operator_name(operand) == WAIT else operand.all_input_nodes[0]
        found += [wait, wait.all_input_nodes[0]]
    return found


def _rebuild(graph: Graph, operand: Node, summand: Node) -> Node:
    """The operand computed from the summand itself instead of from its sum over ranks."""
    if operator_name(operand) != "linear":
        return summand
    with graph.inserting_before(operand):
        weight = operand.args[1]
        product = graph.call_function(operand.target, (summand, weight))  # type: ignore[arg-type]  # a function
    product.meta["nn_module_stack"] = operand.meta.get("nn_module_stack")
    set_record(product, placement=Partial(), site=record(operand).site, stage="fold")
    return product
