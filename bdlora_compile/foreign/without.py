"""A value computed as if one of its summands were zero: what is left of it when a LoRA path is added in another way."""

from torch.fx import Graph, Node

from bdlora_compile.dataflow import MOVES, SCALINGS, NotFollowedError, cone
from bdlora_compile.ir import operator_name, tensor_operands

Rest = dict[Node, Node | None]
"""For each node that a summand reaches what stands for it once the summand is zero: None for zero, itself if copied."""


def rest_without(summand: Node, value: Node) -> Rest:
    """What stands for the nodes from ``summand`` to ``value`` if it is zero; nothing is changed.

    A write of zeros, or of what is there already, goes away.

    Raises:
        NotFollowedError: a node between them does something else with a zero.
    """
    rest: Rest = {summand: None}
    for node in cone(summand, value):
        rest[node] = _rest_of(node, rest)
    return rest


def build_rest(graph: Graph, value: Node, rest: Rest) -> Node | None:
    """The node of ``value`` without the summand, made where the graph inserts; None if nothing is left."""
    made: dict[Node, Node] = {}

    def stands_for(node: Node) -> Node:
        other = rest.get(node, node)
        assert other is not None, f"{node.name}: a zero is read by nothing that is left"
        if other is not node or node not in rest:
            return other if other not in rest else stands_for(other)
        if node not in made:
            operands = {operand: stands_for(operand) for operand in node.all_input_nodes}
            made[node] = graph.node_copy(node, operands.__getitem__)
        return made[node]

    return None if rest[value] is None else stands_for(value)


def _rest_of(node: Node, rest: Rest) -> Node | None:
    operands = tensor_operands(node)
    members = [rest.get(operand, operand) for operand in operands]
    zero = [member is None or _is_empty(member) for member in members]
    name = operator_name(node)
    if all(zero):
        return None
    if name in ("add", "sub") and len(operands) == 2 and any(zero):
        if zero[0] and (name == "sub" or node.kwargs):
            raise NotFollowedError(f"{node.name} ({name}) takes its result away from something")
        return members[1] if zero[0] else members[0]
    if name == "slice_scatter" and (target := members[0]) is not None and (written := members[1]) is not None:
        is_there = operator_name(written) == "slice" and written.args == (target, *node.args[2:])
        return target if is_there else node
    is_known = name in MOVES or name in SCALINGS or name in ("add", "sub")
    if is_known and not any(member is None for member in members):
        return node
    raise NotFollowedError(f"{node.name} ({name}) places its result in a way that is not known")


def _is_empty(node: Node) -> bool:
    """Whether the node makes zeros."""
    name = operator_name(node)
    return name in ("zeros", "zeros_like", "new_zeros") or (name == "full" and node.args[1] in (0, 0.0, False))
