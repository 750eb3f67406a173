"""The graph of a batch in which no row has an adapter: the base model alone.

    Before:  lora_apply_(x, y, A, B); z = f(y)     or, with a collective:  y2 = expand(y, all_gather(...), B); z = f(y2)
    After:   z = f(y)
    Before:  y = lora_linear(x, W, A, B); z = f(y)
    After:   y = linear(x, W); z = f(y)

Legal for such a batch alone: tokens without adapter add nothing. Which of the two graphs runs is decided on the host,
from what `AdapterSet.use` chose, and alike on all ranks.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, Node

from bdlora_compile.errors import PassError
from bdlora_compile.ir import BankSource, Captured, Fact, Origin, record, set_record
from bdlora_compile.lora_nodes import (
    ExpandArguments,
    LinearArguments,
    is_expand,
    is_in_place,
    is_lora_linear,
)
from bdlora_compile.pass_manager import PassContext, erase_unused
from bdlora_compile.report import PassStats


@dataclass(frozen=True, slots=True)
class DropLora:
    """Erase every LoRA path, with its collectives and the adapter bank."""

    name: ClassVar[str] = "drop lora"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PARTITIONED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.BASE_ONLY})

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        graph = captured.graph
        matches = sum(_drop(graph, node) for node in list(graph.nodes))
        orphans = [node for node in graph.nodes if _is_lora(node)]
        erase_unused(graph, orphans)
        return PassStats(matches=matches)

    def verify(self, captured: Captured, context: PassContext) -> None:
        for node in captured.graph.nodes:
            if _is_lora(node):
                raise PassError(
                    f"node {node.name}",
                    found="a LoRA node that the base model's graph reads",
                    expected="no LoRA node",
                    remedy="report this with the graph",
                )


def _drop(graph: Graph, node: Node) -> bool:
    """Use the base product where the LoRA path was added to it; False for other nodes."""
    if is_expand(node):
        node.replace_all_uses_with(ExpandArguments.of(node).y)
    elif is_in_place(node):
        assert not node.users, "an in-place operator has no result"
    elif is_lora_linear(node):
        node.replace_all_uses_with(_base_product(graph, node))
    else:
        return False
    graph.erase_node(node)
    return True


def _base_product(graph: Graph, node: Node) -> Node:
    """The product that the node computes beside its LoRA."""
    arguments = LinearArguments.of(node)
    with graph.inserting_before(node):
        operands = (arguments.x, arguments.weight, *([] if arguments.bias is None else [arguments.bias]))
        y = graph.call_function(torch.nn.functional.linear, operands)
    y.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    set_record(y, placement=record(node).placement, site=record(node).site, stage="drop lora")
    return y


def _is_lora(node: Node) -> bool:
    is_bank = isinstance(record(node).source, BankSource)
    return is_bank or (node.op == "call_function" and record(node).origin is Origin.LORA)
