"""Typed arguments of the LoRA operators' nodes: the one place that knows their order (see `runtime/ops.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch.fx import Graph, Node

from bdlora_compile.ir import operator_name


@dataclass(frozen=True, slots=True)
class _Arguments:
    OPERATOR: ClassVar[str]

    @classmethod
    def is_of(cls, node: Node) -> bool:
        """Whether the node is this operator's."""
        return operator_name(node) == f"bdlora::{cls.OPERATOR}"

    @classmethod
    def of(cls, node: Node) -> Self:
        """The arguments of a node of this operator."""
        return cls(*node.args)

    @classmethod
    def taken_from(cls, *sources: Any, **more: Any) -> Self:
        """Arguments by name: each from the last of the records that has it, or from ``more``."""
        known = {member.name: getattr(source, member.name) for source in sources for member in fields(source)} | more
        return cls(**{member.name: known[member.name] for member in fields(cls) if member.name in known})

    def insert(self, graph: Graph) -> Node:
        """A node of the operator."""
        return graph.call_function(getattr(torch.ops.bdlora, self.OPERATOR).default, self._in_order())

    def write_to(self, node: Node) -> None:
        """Make these the node's arguments."""
        node.args = self._in_order()

    def _in_order(self) -> tuple[Any, ...]:
        """Without what may be left out, and is."""
        values = [(member, getattr(self, member.name)) for member in fields(self)]
        return tuple(value for member, value in values if value is not None or member.default is not None)


@dataclass(frozen=True, slots=True)
class ShrinkArguments(_Arguments):
    """Of ``bdlora::lora_shrink``."""

    OPERATOR = "lora_shrink"

    x: Node
    pool: Node
    slots: Node
    token_slot: Node
    sites: Sequence[int]
    width: int


@dataclass(frozen=True, slots=True)
class LookupArguments(_Arguments):
    """Of ``bdlora::lora_lookup``, which is to an embedding what ``lora_shrink`` is to a linear layer."""

    OPERATOR = "lora_lookup"

    x: Node
    pool: Node
    slots: Node
    token_slot: Node
    sites: Sequence[int]
    width: int
    length: int


@dataclass(frozen=True, slots=True)
class ExpandArguments(_Arguments):
    """Of ``bdlora::lora_expand``."""

    OPERATOR = "lora_expand"

    y: Node
    h: Node
    pool: Node
    slots: Node
    scales: Node
    token_slot: Node
    sites: Sequence[int]
    out_features: Sequence[int]
    parts: int


@dataclass(frozen=True, slots=True)
class ShrinkGroupedArguments(_Arguments):
    """Of ``bdlora::lora_shrink_grouped``."""

    OPERATOR = "lora_shrink_grouped"

    x: Node
    pool: Node
    slots: Node
    token_slot: Node
    order: Node
    segments: Node
    sites: Sequence[int]
    width: int
    parts: int | None = None
    part: int | None = None


@dataclass(frozen=True, slots=True)
class ExpandInPlaceArguments(_Arguments):
    """Of ``bdlora::lora_expand_``, which adds to ``y`` in place."""

    OPERATOR = "lora_expand_"

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


@dataclass(frozen=True, slots=True)
class ApplyArguments(_Arguments):
    """Of ``bdlora::lora_apply_``, which adds to ``y`` in place."""

    OPERATOR = "lora_apply_"

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


@dataclass(frozen=True, slots=True)
class LinearArguments(_Arguments):
    """Of ``bdlora::lora_linear``, a base product with its LoRA."""

    OPERATOR = "lora_linear"

    x: Node
    weight: Node
    bias: Node | None
    pool: Node
    slots: Node
    scales: Node
    token_slot: Node
    order: Node
    segments: Node
    sites: Sequence[int]
    width: int
    out_features: Sequence[int]


@dataclass(frozen=True, slots=True)
class LinearBesideArguments(_Arguments):
    """Of ``bdlora::lora_linear_beside``, which makes LoRA of few tokens beside the base product."""

    OPERATOR = "lora_linear_beside"

    x: Node
    weight: Node
    bias: Node | None
    pool: Node
    slots: Node
    scales: Node
    token_slot: Node
    order: Node
    segments: Node
    sites: Sequence[int]
    width: int
    out_features: Sequence[int]


@dataclass(frozen=True, slots=True)
class LinearBridgedArguments(LinearBesideArguments):
    """Of ``bdlora::lora_linear_bridged``: the same where an all-reduce lies between the factors."""

    OPERATOR = "lora_linear_bridged"

    parts: int
    part: int
    buffer: Node
    one_shot: int
    two_shot: int
    group: str


@dataclass(frozen=True, slots=True)
class CacheWriteArguments(_Arguments):
    """Of ``bdlora::cache_write_``, which has no LoRA; see `runtime/cache_ops.py`."""

    OPERATOR = "cache_write_"

    keys: Node
    values: Node
    k: Node
    v: Node
    lengths: Node


@dataclass(frozen=True, slots=True)
class RotateArguments(_Arguments):
    """Of ``bdlora::rotate_and_cache``; see `runtime/rotary_op.py`."""

    OPERATOR = "rotate_and_cache"

    y: Node
    cos: Node
    sin: Node
    keys: Node
    values: Node
    lengths: Node
    heads: int
    kv_heads: int
    delta: Node | None = None


def is_shrink(node: Node) -> bool:
    """Whether the node is the first half of the LoRA path of a linear layer."""
    return ShrinkArguments.is_of(node)


def is_lookup(node: Node) -> bool:
    """Whether the node is the first half of the LoRA path of an embedding."""
    return LookupArguments.is_of(node)


def first_half(node: Node) -> ShrinkArguments | LookupArguments:
    """The arguments of the first half of a LoRA path."""
    return LookupArguments.of(node) if is_lookup(node) else ShrinkArguments.of(node)


def is_expand(node: Node) -> bool:
    """Whether the node is the second half of a LoRA path."""
    return ExpandArguments.is_of(node)


def is_in_place(node: Node) -> bool:
    """Whether the node is a LoRA path, or its second half, that adds in place."""
    return ApplyArguments.is_of(node) or ExpandInPlaceArguments.is_of(node)


def is_lora_linear(node: Node) -> bool:
    """Whether the node is a base product with its LoRA."""
    return LinearArguments.is_of(node)


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


def is_product_of(y: Node, x: Node) -> bool:
    """Whether y is a linear layer's product of x."""
    return operator_name(y) == "linear" and y.args[0] is x


def weight_and_bias(product: Node) -> tuple[Node, Node | None]:
    """Of a linear layer's product."""
    weight, bias = product.args[1], product.args[2] if len(product.args) > 2 else product.kwargs.get("bias")
    assert isinstance(weight, Node), "a linear layer's weight is a placeholder"
    assert bias is None or isinstance(bias, Node), "and its bias, where it has one"
    return weight, bias
