"""Sum before communicating: two all-reduces that feed one addition become one.

    all_reduce(a) + all_reduce(b)                  ->  all_reduce(a + b)
    all_reduce(a) + s * linear(all_reduce(z), B)   ->  all_reduce(a + s * linear(z, B))    B replicated, without a bias

Both hold by linearity of the sum over ranks, for any a, b, z, s and B; no licence is needed. Views, casts and numbers
between the all-reduce and the addition are linear too. In a graph that this compiler partitioned nothing is left to
fold, since partial sums are added before they are reduced; in graphs that others have sharded (Hugging Face tensor
parallelism with PEFT's LoRA) it removes the adapters' all-reduces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, Node

from bdlora_compile import collectives
from bdlora_compile.collectives import ALL_REDUCE, WAIT
from bdlora_compile.dataflow import SCALINGS, is_linear_step, linear_origin
from bdlora_compile.ir import (
    Captured,
    Fact,
    InputSource,
    fake_tensor,
    is_tensor,
    operator_name,
    record,
    set_record,
    stage_nodes,
    tensor_operands,
)
from bdlora_compile.pass_manager import PassContext, erase_unused
from bdlora_compile.placement import Mesh, Partial, Replicate
from bdlora_compile.propagation import value_key
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


@dataclass(frozen=True, slots=True)
class _Summand:
    """An operand of an addition that is linear in the result of an all-reduce.

    Attributes:
        wait: that result.
        steps: from the operand up to what reads the result; empty if the operand is the result itself.
    """

    wait: Node
    steps: Sequence[Node]

    @property
    def reduced(self) -> Node:
        return self.wait.all_input_nodes[0]


def _fold(graph: Graph, add: Node, mesh: Mesh) -> bool:
    operands = add.all_input_nodes
    if len(operands) != 2 or add.kwargs or not _same_shape(*operands):
        return False
    summands = [found for operand in operands if (found := _summand(operand)) is not None]
    groups = {str(summand.reduced.args[2]) for summand in summands}
    if len(summands) != 2 or len(groups) != 1:
        return False
    for summand in summands:
        reader = summand.steps[-1] if summand.steps else add
        reader.replace_input_with(summand.wait, summand.reduced.all_input_nodes[0])
        for step in summand.steps:
            set_record(step, placement=Partial())
        erase_unused(graph, [summand.wait, summand.reduced])
    with graph.inserting_after(add):
        reduced, result = collectives.all_reduce(graph, add, Mesh(mesh.size, groups.pop()))
    # Nodes made under one insertion point lie in reverse.
    reduced.append(result)
    set_record(add, placement=Partial())
    for node in (reduced, result):
        node.meta |= {key: add.meta.get(key) for key in ("nn_module_stack", "example_value")}
        set_record(node, placement=Replicate(), origin=record(add).origin, stage="fold")
    add.replace_all_uses_with(result, delete_user_cb=lambda user: user is not reduced)
    return True


def _same_shape(first: Node, second: Node) -> bool:
    """Whether nothing is broadcast; symbols are compared by their expressions, since asking them would add a guard."""
    if not (is_tensor(first) and is_tensor(second)):
        return False
    return value_key(tuple(fake_tensor(first).shape)) == value_key(tuple(fake_tensor(second).shape))


def _summand(value: Node) -> _Summand | None:
    """The operand as a linear function of the result of an all-reduce that nothing else reads, None if it is none."""
    steps: list[Node] = []
    node = value
    while len(node.users) == 1:
        if operator_name(node) == WAIT:
            reduced = node.all_input_nodes[0]
            is_sum = operator_name(reduced) == ALL_REDUCE and reduced.args[1] == "sum" and len(reduced.users) == 1
            return _Summand(node, steps) if is_sum else None
        before = _linear_operand(node)
        if before is None:
            return None
        steps.append(node)
        node = before
    return None


def _linear_operand(node: Node) -> Node | None:
    """The operand in which a node is linear, the others being the same on every rank."""
    operands = tensor_operands(node)
    if is_linear_step(node):
        # A number may be another one on each rank: then nothing says that the scaled sum is the same on all of them.
        is_same = operator_name(node) not in SCALINGS or isinstance(record(node).placement, (Replicate, Partial))
        return operands[0] if len(operands) == 1 and is_same else None
    # A third operand is a bias, which would be added once a rank.
    if operator_name(node) not in ("linear", "mm") or len(operands) != 2:
        return None
    first, second = operands
    if _is_replicated(second):
        return first
    return second if _is_replicated(first) else None


def _is_replicated(factor: Node) -> bool:
    """Whether a factor is made of parameters that every rank holds whole."""
    origin = linear_origin(factor)
    return all(
        node.op == "placeholder"
        and not isinstance(record(node).source, InputSource)
        and isinstance(record(node).placement, Replicate)
        for node in origin
    )
