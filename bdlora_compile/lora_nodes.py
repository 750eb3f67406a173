"""Typed arguments of the LoRA operators' nodes: the one place that knows their order (see `runtime/ops.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch.fx import Graph, Node

from bdlora_compile.ir import operator_name

SHRINK = "bdlora::lora_shrink"
LOOKUP = "bdlora::lora_lookup"
EXPAND = "bdlora::lora_expand"
SHRINK_GROUPED = "bdlora::lora_shrink_grouped"
EXPAND_IN_PLACE = "bdlora::lora_expand_"
APPLY = "bdlora::lora_apply_"
LINEAR = "bdlora::lora_linear"


@dataclass(frozen=True, slots=True)
class _Arguments:
    @classmethod
    def of(cls, node: Node) -> Self:
        """The arguments of a node of this operator."""
        return cls(*node.args)

    @classmethod
    def taken_from(cls, *sources: Any, **more: Any) -> Self:
        """Arguments by name: each from the last of the records that has it, or from ``more``."""
        known = {member.name: getattr(source, member.name) for source in sources for member in fields(source)} | more
        return cls(**{member.name: known[member.name] for member in fields(cls)})

    def write_to(self, node: Node) -> None:
        """Make these the node's arguments."""
        node.args = self._in_order()

    def _in_order(self) -> tuple[Any, ...]:
        return tuple(getattr(self, member.name) for member in fields(self))


@dataclass(frozen=True, slots=True)
class ShrinkArguments(_Arguments):
    """Of ``bdlora::lora_shrink``."""

    x: Node
    pool: Node
    slots: Node
    token_slot: Node
    sites: Sequence[int]
    width: int

    def insert(self, graph: Graph) -> Node:
        """A node of the operator."""
        return graph.call_function(torch.ops.bdlora.lora_shrink.default, self._in_order())


@dataclass(frozen=True, slots=True)
class LookupArguments(_Arguments):
    """Of ``bdlora::lora_lookup``, which is to an embedding what ``lora_shrink`` is to a linear layer."""

    x: Node
    pool: Node
    slots: Node
    token_slot: Node
    sites: Sequence[int]
    width: int
    length: int

    def insert(self, graph: Graph) -> Node:
        """A node of the operator."""
        return graph.call_function(torch.ops.bdlora.lora_lookup.default, self._in_order())


@dataclass(frozen=True, slots=True)
class ExpandArguments(_Arguments):
    """Of ``bdlora::lora_expand``."""

    y: Node
    h: Node
    pool: Node
    slots: Node
    scales: Node
    token_slot: Node
    sites: Sequence[int]
    out_features: Sequence[int]
    parts: int

    def insert(self, graph: Graph) -> Node:
        """A node of the operator."""
        return graph.call_function(torch.ops.bdlora.lora_expand.default, self._in_order())


@dataclass(frozen=True, slots=True)
class ShrinkGroupedArguments(_Arguments):
    """Of ``bdlora::lora_shrink_grouped``."""

    x: Node
    pool: Node
    slots: Node
    token_slot: Node
    order: Node
    segments: Node
    sites: Sequence[int]
    width: int

    def insert(self, graph: Graph) -> Node:
        """A node of the operator."""
        return graph.call_function(torch.ops.bdlora.lora_shrink_grouped.default, self._in_order())


@dataclass(frozen=True, slots=True)
class ExpandInPlaceArguments(_Arguments):
    """Of ``bdlora::lora_expand_``, which adds to ``y`` in place."""

    y: Node
    h: Node
    pool: Node
    slots: Node
    scales: Node
    token_slot: Node
    order: Node
    segments: Node
    sites: Sequence[int]
    out_features: Sequence[int]
    parts: int

    def insert(self, graph: Graph) -> Node:
        """A node of the operator."""
        return graph.call_function(torch.ops.bdlora.lora_expand_.default, self._in_order())


@dataclass(frozen=True, slots=True)
class ApplyArguments(_Arguments):
    """Of ``bdlora::lora_apply_``, which adds to ``y`` in place."""

    x: Node
    y: Node
    pool: Node
    slots: Node
    scales: Node
    token_slot: Node
    order: Node
    segments: Node
    sites: Sequence[int]
    width: int
    out_features: Sequence[int]

    def insert(self, graph: Graph) -> Node:
        """A node of the operator."""
        return graph.call_function(torch.ops.bdlora.lora_apply_.default, self._in_order())


@dataclass(frozen=True, slots=True)
class LinearArguments(_Arguments):
    """Of ``bdlora::lora_linear``, a base product with its LoRA."""

    x: Node
    weight: Node
    pool: Node
    slots: Node
    scales: Node
    token_slot: Node
    order: Node
    segments: Node
    counters: Node
    sites: Sequence[int]
    width: int
    out_features: Sequence[int]

    def insert(self, graph: Graph) -> Node:
        """A node of the operator."""
        return graph.call_function(torch.ops.bdlora.lora_linear.default, self._in_order())


def is_shrink(node: Node) -> bool:
    """Whether the node is the first half of the LoRA path of a linear layer."""
    return operator_name(node) == SHRINK


def is_lookup(node: Node) -> bool:
    """Whether the node is the first half of the LoRA path of an embedding."""
    return operator_name(node) == LOOKUP


def first_half(node: Node) -> ShrinkArguments | LookupArguments:
    """The arguments of the first half of a LoRA path."""
    return LookupArguments.of(node) if is_lookup(node) else ShrinkArguments.of(node)


def is_expand(node: Node) -> bool:
    """Whether the node is the second half of a LoRA path."""
    return operator_name(node) == EXPAND


def is_in_place(node: Node) -> bool:
    """Whether the node is a LoRA path, or its second half, that adds in place."""
    return operator_name(node) in (APPLY, EXPAND_IN_PLACE)


def is_lora_linear(node: Node) -> bool:
    """Whether the node is a base product with its LoRA."""
    return operator_name(node) == LINEAR


def bridge_of(expand: Node) -> tuple[Node, list[Node]]:
    """(shrink or lookup, what lies between it and ``expand``, nearest to the expand first)."""
    bridge: list[Node] = []
    pending = [ExpandArguments.of(expand).h]
    shrink = None
    while pending:
        node = pending.pop(0)
        if is_shrink(node) or is_lookup(node):
            shrink = node
        elif node not in bridge:
            bridge.append(node)
            pending += node.all_input_nodes
    assert shrink is not None, f"{expand.name}: h comes from a shrink or a lookup"
    return shrink, bridge
