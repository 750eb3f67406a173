"""LoRA paths of a finished graph of GPUs, and how each leaves its second half to the kernel that reads its product.

For few tokens alone: that is known when the graph runs, so who is left with it and who leaves it ask the same question
(`linear_op.is_served_by_token`).
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from bdlora_compile.ir import Origin, fake_tensor, operator_name, record, set_record
from bdlora_compile.lora_nodes import (
    ApplyArguments,
    ExpandDeferredArguments,
    ExpandInPlaceArguments,
    LinearAheadArguments,
    LinearArguments,
    LinearBridgedArguments,
    LinearDeferredArguments,
    is_lora_linear,
)
from bdlora_compile.runtime.kernels.tiles import h_width, leaves_lora, planes_ahead


@dataclass(frozen=True, slots=True)
class Left:
    """What a path has left to who reads its product.

    Attributes:
        y: the product, which lacks B h.
        h: float32 [planes, T, parts * n, width].
        pool, slots, scales, token_slot, sites, out_features, parts: as for `ops.lora_expand`.
    """

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
class Layout:
    """What a reader that is left B h needs to know beside values: h is [planes, T, parts * n, width].

    Attributes:
        planes, parts, width: of h.
        rows: of the slot table.
        sites: n of them.
        out_features: columns that B writes, for each site.
    """

    planes: int
    parts: int
    width: int
    rows: int
    sites: Sequence[int]
    out_features: Sequence[int]


class Path(ABC):
    """A product with its LoRA; ``label`` is what reports call it."""

    label: str

    @property
    @abstractmethod
    def arguments(self) -> LinearArguments | ExpandInPlaceArguments:
        """Of the operator that adds B h; read again each time, since another rewrite may have changed them."""

    @property
    @abstractmethod
    def y(self) -> Node:
        """The result."""

    @property
    @abstractmethod
    def readers(self) -> list[Node]:
        """Who reads it, but for the path itself."""

    @property
    @abstractmethod
    def pays_to_leave(self) -> bool:
        """Whether it is faster to leave B h to a reader that has other work anyway."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Of the h that it would leave."""

    @abstractmethod
    def leave(self, graph: Graph) -> Left:
        """Rewrite the path so that it leaves B h; the reader must be rewritten next."""

    @property
    def num_sites(self) -> int:
        """Products that lie side by side in it."""
        return len(self.arguments.sites)

    @property
    def token_slot(self) -> Node:
        """Each token's slot."""
        return self.arguments.token_slot


@dataclass(frozen=True, slots=True)
class LocalPath(Path):
    """One operator, `lora_linear`."""

    product: Node
    label: str

    @property
    def y(self) -> Node:
        """The operator's result."""
        return self.product

    @property
    def arguments(self) -> LinearArguments:
        """Of the operator."""
        return LinearArguments.of(self.product)

    @property
    def readers(self) -> list[Node]:
        """Who reads the result."""
        return [*self.y.users]

    @property
    def pays_to_leave(self) -> bool:
        """Where h is there anyway, or the product is large."""
        known = self.arguments
        in_features = int(fake_tensor(known.x).shape[-1])
        return known.h_planes is not None or leaves_lora(in_features, known.out_features, known.width)

    @property
    def layout(self) -> Layout:
        """Of the h that is there, or that would be made."""
        known = self.arguments
        if known.h_planes is not None:
            planes, _, _, width = fake_tensor(known.h_planes).shape
        else:
            planes, width = planes_ahead(int(fake_tensor(known.x).shape[-1]), known.width), h_width(known.width)
        return Layout(int(planes), 1, int(width), _rows_of(known.slots), known.sites, known.out_features)

    def leave(self, graph: Graph) -> Left:
        """The product alone, with a launch that makes h ahead of it unless h is there."""
        known = self.arguments
        y, h = self._make_h(graph) if known.h_planes is None else (self.defer(graph), known.h_planes)
        bank = (known.pool, known.slots, known.scales, known.token_slot)
        return Left(y, h, *bank, known.sites, known.out_features, 1)

    def defer(self, graph: Graph) -> Node:
        """The product alone: the reader has h, or makes it."""
        with graph.inserting_before(self.product):
            y = LinearDeferredArguments.taken_from(self.arguments).insert(graph)
        return self._replace_by(graph, y)

    def _make_h(self, graph: Graph) -> tuple[Node, Node]:
        """(the product, h), of one operator."""
        own, stack = record(self.product), self.product.meta.get("nn_module_stack")
        with graph.inserting_before(self.product):
            pair = LinearAheadArguments.taken_from(self.arguments).insert(graph)
            y, h = (graph.call_function(operator.getitem, (pair, index)) for index in (0, 1))
        pair.meta = {"nn_module_stack": stack}
        set_record(pair, placement=own.placement, site=own.site, stage="emit")
        h.meta["nn_module_stack"] = stack
        set_record(h, origin=Origin.LORA, site=own.site, stage="emit")
        return self._replace_by(graph, y), h

    def _replace_by(self, graph: Graph, y: Node) -> Node:
        y.meta = dict(self.product.meta)
        self.product.replace_all_uses_with(y)
        graph.erase_node(self.product)
        return y


@dataclass(frozen=True, slots=True)
class BridgedPath(Path):
    """A product, and LoRA added in place behind a collective (S-LoRA)."""

    expand: Node
    label: str

    @property
    def arguments(self) -> ExpandInPlaceArguments:
        """Of the second half."""
        return ExpandInPlaceArguments.of(self.expand)

    @property
    def y(self) -> Node:
        """The product."""
        return self.arguments.y

    @property
    def readers(self) -> list[Node]:
        """Who reads the result."""
        return [node for node in self.y.users if node is not self.expand]

    @property
    def pays_to_leave(self) -> bool:
        """Always: it saves a launch."""
        return True

    @property
    def layout(self) -> Layout:
        """Of the h that the ranks have exchanged."""
        known = self.arguments
        width = int(fake_tensor(known.h).shape[1]) // (known.parts * len(known.sites))
        return Layout(1, known.parts, width, _rows_of(known.slots), known.sites, known.out_features)

    def leave(self, graph: Graph) -> Left:
        """For few tokens nothing is added to the product."""
        known, layout = self.arguments, self.layout
        shape = (layout.planes, -1, layout.parts * len(layout.sites), layout.width)
        with graph.inserting_before(self.expand):
            deferred = ExpandDeferredArguments.taken_from(known).insert(graph)
            h = graph.call_function(torch.reshape, (known.h, shape))
        deferred.meta = dict(self.expand.meta)
        h.meta["nn_module_stack"] = self.expand.meta.get("nn_module_stack")
        set_record(h, origin=Origin.LORA, site=record(self.expand).site, stage="emit")
        graph.erase_node(self.expand)
        bank = (known.pool, known.slots, known.scales, known.token_slot)
        return Left(known.y, h, *bank, known.sites, known.out_features, known.parts)


def paths_of(graph: Graph) -> list[Path]:
    """All paths of a graph that leave what they may, in its order."""
    found: list[Path] = []
    for node in graph.nodes:
        if is_lora_linear(node):
            found.append(local_path(node))
        elif ExpandInPlaceArguments.is_of(node) and _is_product(ExpandInPlaceArguments.of(node).y):
            found.append(BridgedPath(node, _label(node)))
    return found


def _is_product(y: Node) -> bool:
    """Whether it comes from a linear layer, alone or beside an exchange."""
    return operator_name(y) == "linear" or LinearBridgedArguments.is_of(y.all_input_nodes[0])


def local_path(product: Node) -> LocalPath:
    """The path of a `lora_linear`."""
    return LocalPath(product, _label(product))


def _label(node: Node) -> str:
    return record(node).site or node.name


def _rows_of(slots: Node) -> int:
    return int(fake_tensor(slots).shape[0])


def products_apart(graph: Graph) -> list[str]:
    """What reports call the paths whose product and LoRA are two operators, without a collective between factors."""
    return [_label(node) for node in graph.nodes if ApplyArguments.is_of(node)]
