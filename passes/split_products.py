"""Write every product with a factor as ``mm``, so that later passes have one thing to look for.

    Before:  addmm(c, a, b, beta=p, alpha=q)          After:  p * c + q * mm(a, b)
             bmm(a, expand(w))   a [n, S, W]                  reshape(mm(reshape(a, [n S, W]), w), [n, S, O])
             bmm(expand(w), b)   b [n, W, S]                  the same from the other side
             bmm(a, b)           n = 1                        reshape(mm(a[0], b[0]), [1, S, O])

How a product was written depends on the strides of its operands and on taste. Inductor joins sums and products again.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from bdlora_compile.dataflow import NotFollowedError, view_sizes
from bdlora_compile.ir import Captured, Fact, fake_tensor, operator_name, record, set_record
from bdlora_compile.pass_manager import PassContext, erase_unused
from bdlora_compile.report import PassStats

_ATEN = torch.ops.aten


@dataclass(frozen=True, slots=True)
class SplitProducts:
    """Only ``mm`` is left of products that have a factor for all tokens."""

    name: ClassVar[str] = "split products"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    establishes: ClassVar[frozenset[Fact]] = frozenset()

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        graph = captured.graph
        matches = 0
        for node in list(graph.nodes):
            with graph.inserting_before(node):
                made = _rewritten(graph, node)
            if made is None:
                continue
            for key in ("nn_module_stack", "stack_trace"):
                made.meta[key] = node.meta.get(key)
            node.replace_all_uses_with(made)
            operands = node.all_input_nodes
            graph.erase_node(node)
            erase_unused(graph, [operand for operand in operands if operator_name(operand) == "expand"])
            matches += 1
        return PassStats(matches=matches)

    def verify(self, captured: Captured, context: PassContext) -> None:
        """Nothing beyond shapes: the same products in other words."""


def _rewritten(graph: Graph, node: Node) -> Node | None:
    try:
        match operator_name(node):
            case "addmm":
                return _sum_and_product(graph, node)
            case "bmm":
                return _one_product(graph, node)
            case _:
                return None
    except NotFollowedError:
        # A product of several symbolic sizes stays as it is: the tag pass says so if it is part of a path.
        return None


def _sum_and_product(graph: Graph, node: Node) -> Node:
    added, first, second = node.args[:3]
    product = _scaled(graph, _call(graph, node, _ATEN.mm.default, first, second), node.kwargs.get("alpha", 1))
    rest = _scaled(graph, added, node.kwargs.get("beta", 1))
    return _call(graph, node, _ATEN.add.Tensor, rest, product)


def _scaled(graph: Graph, value: Any, number: Any) -> Node:
    scaled: Node = value if number == 1 else _call(graph, value, _ATEN.mul.Tensor, value, number)
    return scaled


def _one_product(graph: Graph, node: Node) -> Node | None:
    first, second = node.all_input_nodes[:2] if len(node.all_input_nodes) == 2 else node.all_input_nodes * 2
    a, b = fake_tensor(first), fake_tensor(second)
    if isinstance(a.shape[0], int) and a.shape[0] == 1:
        left = _call(graph, node, _ATEN.select.int, first, 0, 0)
        right = _call(graph, node, _ATEN.select.int, second, 0, 0)
        return _call(graph, node, _ATEN.unsqueeze.default, _call(graph, node, _ATEN.mm.default, left, right), 0)
    if (factor := _expanded(second)) is not None:
        rows = _call(graph, node, _ATEN.reshape.default, first, [-1, a.shape[2]])
        product = _call(graph, node, _ATEN.mm.default, rows, factor)
        return _call(graph, node, _ATEN.reshape.default, product, view_sizes(node))
    if (factor := _expanded(first)) is not None:
        turned = _call(graph, node, _ATEN.transpose.int, second, 1, 2)
        columns = _call(graph, node, _ATEN.reshape.default, turned, [-1, b.shape[1]])
        product = _call(graph, node, _ATEN.mm.default, columns, _call(graph, node, _ATEN.t.default, factor))
        sizes = view_sizes(node)
        turned_back = _call(graph, node, _ATEN.reshape.default, product, [sizes[0], sizes[2], sizes[1]])
        return _call(graph, node, _ATEN.transpose.int, turned_back, 1, 2)
    return None


def _expanded(node: Node) -> Node | None:
    """The matrix that is the same for all products of a ``bmm``, None if there is none."""
    source = node.all_input_nodes[0] if operator_name(node) == "expand" else None
    return source if source is not None and fake_tensor(source).ndim == 2 else None


def _call(graph: Graph, like: Node, target: Any, *args: Any) -> Node:
    made = graph.call_function(target, args)
    set_record(made, placement=record(like).placement, stage="split products")
    return made
