"""The collectives of a graph: how many, of what size, for what, in which layers.

Bytes are counted in two ways, both for one rank:

    payload   all-reduce, reduce-scatter, all-to-all: bytes of the operand; all-gather: bytes of the result
    wire      bytes that a rank sends in a ring: all-reduce 2 (N-1)/N of the payload, the others (N-1)/N of it

Source of the ring's bytes: Patarasuk and Yuan, J. Parallel Distrib. Comput. 69 (2009) 117. Sizes that vary from call to
call are sympy expressions in `BATCH` and `SEQ`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import sympy
import torch
from torch.fx import Node

from bdlora_compile.collectives import is_collective
from bdlora_compile.errors import ConfigError
from bdlora_compile.ir import Captured, Origin, fake_value, layer_of, module_path, node_key, operator_name, record
from bdlora_compile.placement import Mesh
from bdlora_compile.printer import dtype_text

OUTSIDE = "outside layers"
"""Where the collectives of the embedding and the logits are counted."""

BATCH = sympy.Symbol("batch", integer=True, positive=True)
"""Rows of a forward."""
SEQ = sympy.Symbol("seq", integer=True, positive=True)
"""Tokens that a forward adds to each row."""

Measure = Literal["payload", "wire"]

_WIRE_SHARES = {
    "all_reduce": 2,
    "all_gather_into_tensor": 1,
    "reduce_scatter_tensor": 1,
    "all_to_all_single": 1,
}
"""How many times (N-1)/N of the payload a rank sends in a ring."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective of a graph.

    Attributes:
        kind: name of the operator, for example ``all_reduce``.
        group_size: N, the ranks that take part.
        shape: of the operand on one rank.
        dtype: ``bf16``, ``f32`` and so on.
        element_size: bytes of an element.
        origin: what it communicates for.
        layers: paths of the layers in which it runs: its own and those that its layer stands for; empty outside layers.
        site: the LoRA site or sites that it belongs to, None if it belongs to none.
        key: its node's stable key (see `node_names.py`).
    """

    kind: str
    group_size: int
    shape: tuple[sympy.Expr, ...]
    dtype: str
    element_size: int
    origin: Origin
    layers: tuple[str, ...] = ()
    site: str | None = None
    key: str = ""

    @property
    def runs(self) -> int:
        """How often it runs in one forward."""
        return max(len(self.layers), 1)

    @property
    def payload_bytes(self) -> sympy.Expr:
        """Bytes of one run: of the operand, of an all-gather those of the result."""
        operand = sympy.Mul(*self.shape) * self.element_size
        return operand * self.group_size if self.kind == "all_gather_into_tensor" else operand

    @property
    def wire_bytes(self) -> sympy.Expr:
        """Bytes that a rank sends in one run."""
        return self.payload_bytes * wire_share(self.kind, self.group_size)

    @property
    def shape_text(self) -> str:
        """``[batch, seq, 64]``."""
        return f"[{', '.join(map(str, self.shape))}]"


def wire_share(kind: str, group_size: int) -> sympy.Rational:
    """Bytes that a rank sends in a ring, as a part of the payload."""
    return sympy.Rational(_WIRE_SHARES[kind] * (group_size - 1), group_size)


@dataclass(frozen=True, slots=True)
class Census:
    """The collectives of a graph, in its order."""

    collectives: Sequence[Collective]

    @property
    def counts(self) -> Mapping[tuple[str, str, str], int]:
        """How many run in a forward, by (layer, origin, kind); layer is a path or `OUTSIDE`."""
        found: Counter[tuple[str, str, str]] = Counter()
        for one in self.collectives:
            found.update((layer, one.origin.value, one.kind) for layer in one.layers or (OUTSIDE,))
        return dict(found)

    @property
    def layers(self) -> Sequence[str]:
        """Layers that have a collective, in order of first use."""
        return list(dict.fromkeys(layer for one in self.collectives for layer in one.layers))

    def total(self, origin: Origin | None = None) -> int:
        """Collectives of a forward in all, or of one origin."""
        return sum(one.runs for one in self.collectives if origin in (None, one.origin))

    def per_layer(self, origin: Origin) -> Sequence[int]:
        """Collectives of one origin in each decoder layer that has any collective."""
        return [sum(layer in one.layers for one in self.collectives if one.origin is origin) for layer in self.layers]

    def bytes_of_forward(self, measure: Measure, origin: Origin | None = None) -> sympy.Expr:
        """Bytes of one forward on one rank, of all collectives or of those of one origin."""
        chosen = [one for one in self.collectives if origin in (None, one.origin)]
        return _sum(one.runs * _measured(one, measure) for one in chosen)

    def bytes_of_layer(self, layer: str, measure: Measure, origin: Origin | None = None) -> sympy.Expr:
        """Bytes of one layer (a path, or `OUTSIDE`) in one forward on one rank."""
        chosen = [
            one for one in self.collectives if origin in (None, one.origin) and layer in (one.layers or [OUTSIDE])
        ]
        return _sum(_measured(one, measure) for one in chosen)


def number_of(size: sympy.Expr, batch: int, seq: int) -> int:
    """A size in numbers, for a forward of ``batch`` rows of ``seq`` tokens; part of a byte counts as one.

    Raises:
        ConfigError: the size depends on something else too (a length that only a run can tell).
    """
    value = size.xreplace({BATCH: sympy.Integer(batch), SEQ: sympy.Integer(seq)})
    if not value.is_number:
        raise ConfigError(
            "size of a collective",
            found=str(value),
            expected="an expression in batch and seq",
            remedy="run the model: this size depends on data",
        )
    return int(sympy.ceiling(value))


def take_census(captured: Captured, mesh: Mesh) -> Census:
    """The collectives of a graph; one of a layer that stands for others counts for each of them."""
    names = _names_of_sizes(captured)
    return Census([_describe(node, captured, mesh, names) for node in captured.graph.nodes if is_collective(node)])


def _describe(node: Node, captured: Captured, mesh: Mesh, names: Mapping[sympy.Expr, sympy.Expr]) -> Collective:
    operand = node.args[0]
    value = fake_value(operand) if isinstance(operand, Node) else None
    assert isinstance(value, torch.Tensor), f"{node.name}: shapes are known when collectives are counted"
    kind = operator_name(node).split("::")[-1]
    sizes = [arg for arg in node.args[1:] if isinstance(arg, int)]
    info = record(node)
    return Collective(
        kind=kind,
        # An all-gather names the size of its group; the others run on the mesh.
        group_size=sizes[0] if sizes else mesh.size,
        shape=tuple(_expression(size).xreplace(names) for size in value.shape),
        dtype=dtype_text(value.dtype),
        element_size=value.element_size(),
        origin=info.origin,
        layers=_layers_of(layer_of(module_path(node)), captured),
        site=info.site if info.origin is Origin.LORA else None,
        key=node_key(node),
    )


def _layers_of(path: str | None, captured: Captured) -> tuple[str, ...]:
    if path is None:
        return ()
    layers = captured.layers
    if layers is None:
        return (path,)
    return tuple(layers.path(number) for number, kept in enumerate(layers.stands_in) if layers.path(kept) == path)


def _names_of_sizes(captured: Captured) -> dict[sympy.Expr, sympy.Expr]:
    """What the forward's own symbols are called here: the first two dims of its tokens are [batch, seq]."""
    value = fake_value(captured.token_input) if captured.token_input is not None else None
    if not isinstance(value, torch.Tensor):
        return {}
    sizes = [_expression(size) for size in value.shape[:2]]
    return {size: name for size, name in zip(sizes, (BATCH, SEQ), strict=False) if size.is_Symbol}


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _measured(one: Collective, measure: Measure) -> sympy.Expr:
    return one.payload_bytes if measure == "payload" else one.wire_bytes


def _sum(terms: Iterable[sympy.Expr]) -> sympy.Expr:
    return sympy.expand(sympy.Add(*terms))
