"""Bring a captured graph into one form, so that later passes have one thing to look for.

Before:  x1 = shard_only(x, "model.layers.0.mlp")         after:  (erased: x is used itself)
         _set_grad_enabled(False), _log_api_usage_once()          (erased: this is inference)
         n = x.size(); b = n[0]                                   8, where the size is a known number
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, Node

from bdlora_compile.ir import Captured, Fact, fake_value, operator_name, replace_by_literal
from bdlora_compile.pass_manager import PassContext, erase_unused
from bdlora_compile.report import PassStats

_BOOKKEEPING = frozenset({"set_grad_enabled", "_set_grad_enabled", "_log_api_usage_once"})


@dataclass(frozen=True, slots=True)
class Canonicalize:
    """Erase bookkeeping and guards of hollow modules; fold known sizes."""

    name: ClassVar[str] = "canonicalize"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        graph = captured.graph
        notes = {
            "guards erased": _erase_guards(graph),
            "bookkeeping erased": _erase_bookkeeping(graph),
            "sizes folded": _fold_sizes(graph),
        }
        return PassStats(matches=sum(notes.values()), notes=notes)

    def verify(self, captured: Captured, context: PassContext) -> None:
        """Nothing beyond shapes: the pass only erases."""


def _erase_guards(graph: Graph) -> int:
    guards = graph.find_nodes(op="call_function", target=torch.ops.bdlora.shard_only.default)
    for node in guards:
        operand = node.args[0]
        assert isinstance(operand, Node), "shard_only guards a tensor of the graph"
        node.replace_all_uses_with(operand)
        graph.erase_node(node)
    return len(guards)


def _erase_bookkeeping(graph: Graph) -> int:
    nodes = [node for node in graph.nodes if node.op == "call_function" and operator_name(node) in _BOOKKEEPING]
    return erase_unused(graph, nodes)


def _fold_sizes(graph: Graph) -> int:
    """Replace ``x.size(d)``, ``x.size()[d]`` and ``x.shape[d]`` by the number, where it is one.

    A symbol stays: only batch and sequence lengths are symbols, and no placement cuts those.
    """
    readers = [node for node in graph.nodes if _is_size(node)]
    folded = 0
    for node in readers:
        for user in list(node.users):
            value = fake_value(user)
            if operator_name(user) == "getitem" and isinstance(value, int):
                replace_by_literal(user, value)
                folded += 1
        if isinstance(value := fake_value(node), int):
            replace_by_literal(node, value)
            folded += 1
    items = [user for node in readers for user in node.users]
    erase_unused(graph, [*readers, *items])
    return folded


def _is_size(node: Node) -> bool:
    if node.op == "call_method":
        return node.target == "size"
    return operator_name(node) == "getattr" and node.args[1] == "shape"
