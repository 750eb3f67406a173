"""S-LoRA's exchanges between the ranks, beside the base product that reads the same operand.

    Before:  y = linear(x, W);  h = lora_shrink_grouped(x, A, ...);  r = bdlora::all_reduce(h, ...)
    After:   y, r = lora_linear_bridged(x, W, A, ...)

For graphs of GPUs whose collectives go through symmetric memory. Local paths have no exchange; their h is made beside
the product too (`linear_op.lora_linear_ahead`).
"""

import operator

from torch.fx import Graph, Node

from bdlora_compile.ir import Origin, operator_name, record, set_record
from bdlora_compile.lora_nodes import ExpandInPlaceArguments, LinearBridgedArguments, ShrinkGroupedArguments
from bdlora_compile.pass_manager import erase_with_operands
from bdlora_compile.report import PassStats, Refusal

_REDUCE = "bdlora::all_reduce"
_OTHER_BRIDGE = "what lies between its factors is not one all-reduce through symmetric memory"
_NOT_ALONE = "its product has a bias, or reads another operand"
_CHOSEN = "its tokens are chosen in the graph"


def put_exchanges_beside(graph: Graph) -> PassStats:
    """Rewrite all paths for which it can be done; the others say why not."""
    refusals, matches = [], 0
    for expand in [node for node in graph.nodes if ExpandInPlaceArguments.is_of(node)]:
        known = ExpandInPlaceArguments.of(expand)
        reason = _reason(known)
        if reason:
            refusals.append(Refusal(record(expand).site or expand.name, reason))
        else:
            _put_beside(graph, expand, known)
            matches += 1
    graph.lint()
    return PassStats(matches, refusals)


def _reason(known: ExpandInPlaceArguments) -> str:
    """Why a path stays as it is; empty if it does not."""
    if operator_name(known.h) != _REDUCE or not ShrinkGroupedArguments.is_of(_operand(known.h)):
        return _OTHER_BRIDGE
    first = ShrinkGroupedArguments.of(_operand(known.h))
    operands = [operand for operand in (*known.y.args, *known.y.kwargs.values()) if operand is not None]
    if operator_name(known.y) != "linear" or operands[0] is not first.x or len(operands) != 2:
        return _NOT_ALONE
    return "" if first.token_slot.op == "placeholder" else _CHOSEN


def _operand(node: Node) -> Node:
    return node.all_input_nodes[0]


def _put_beside(graph: Graph, expand: Node, known: ExpandInPlaceArguments) -> None:
    product, reduced = known.y, known.h
    first = ShrinkGroupedArguments.of(_operand(reduced))
    _, buffer, one_shot, two_shot, group = reduced.args
    more = {"weight": product.args[1], "parts": first.parts or 1, "part": first.part or 0}
    more |= {"buffer": buffer, "one_shot": one_shot, "two_shot": two_shot, "group": group}
    # Nobody reads the product before LoRA is added to it.
    with graph.inserting_before(expand):
        pair = LinearBridgedArguments.taken_from(first, **more).insert(graph)
        y, h = (graph.call_function(operator.getitem, (pair, index)) for index in (0, 1))
    pair.meta = {"nn_module_stack": product.meta.get("nn_module_stack")}
    set_record(pair, placement=record(product).placement, site=record(expand).site, stage="emit")
    y.meta, h.meta = dict(product.meta), dict(reduced.meta)
    set_record(h, origin=Origin.LORA)
    product.replace_all_uses_with(y)
    reduced.replace_all_uses_with(h)
    for node in (product, reduced):
        erase_with_operands(graph, node)
