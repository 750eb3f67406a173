"""LoRA paths in graphs that others sharded: a product, a collective and a second product, as the tag pass finds them.

Legend: T tokens, D/O in/out features, R adapter rank, N ranks, k this rank, z what a rank gives to the collective.

    column   z = x A_k^T [T, R/N]     h = all_gather(z) [T, R]     y_k += h B_k^T      B_k [O/N, R]
    row      z = x_k A_k^T [T, R]     h = all_reduce(z) [T, R]     y[own O/N columns] += h B_k^T, before an all-reduce;
                                                                   or all_gather(h B_k^T) added after it
    linear   z = x_k A_k^T [T, R]     h = all_reduce(z) [T, R]     y += h B^T          B [O, R] the same on every rank
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch.fx import Graph, Node

from bdlora_compile.dataflow import concrete, linear_origin
from bdlora_compile.ir import ArgumentWeight, fake_tensor, operator_name, record


@dataclass(frozen=True, slots=True)
class GroupMember:
    """This rank in a process group: its number there, and how many there are."""

    rank: int
    size: int


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product (``mm``) of data and of a factor that is made of one parameter.

    Attributes:
        node: the product.
        data: what the graph computes, [T, W]; [W, T] if it is the second operand.
        factor: what is made of the parameter, [W, O]; [O, W] if it is the first operand.
        parameter: the placeholder.
        data_first: whether data is the first operand.
    """

    node: Node
    data: Node
    factor: Node
    parameter: Node
    data_first: bool

    @property
    def inner_dim(self) -> int:
        """Dim of ``factor`` that the product sums over."""
        return 0 if self.data_first else 1

    @property
    def num_tokens(self) -> int:
        """T that the capture saw."""
        return concrete(fake_tensor(self.data).shape[0 if self.data_first else 1])

    @property
    def num_features(self) -> int:
        """O."""
        return concrete(fake_tensor(self.factor).shape[1 if self.data_first else 0])

    def with_operands(self, graph: Graph, data: Node, factor: Node) -> Node:
        """The same product of other operands."""
        made = graph.call_function(torch.ops.aten.mm.default, (data, factor) if self.data_first else (factor, data))
        made.meta = dict(self.node.meta)
        return made


@dataclass(frozen=True, slots=True)
class Licence:
    """What a rewrite needs of a factor: that it is zero outside this rank's part of the rank dim.

    Attributes:
        parameter: its placeholder.
        name: its name in the user's model.
        nblocks: blocks that its owner declared.
        rank_dim: the dim of the parameter that is the adapter's rank R.
        start, stop: this rank's part of that dim.
    """

    parameter: Node
    name: str
    nblocks: int
    rank_dim: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ColumnPath:
    """A path with a gather between its factors.

    Attributes:
        licence: for B.
        product: the second product.
        collective: what the gather gives (the wait).
        local: z, what this rank gives to it.
        local_dims: the dims of z in the order in which it is [T, W].
        width: W of it.
        local_columns: the columns of z that are this rank's own part, in the order of ``factor_columns``.
        factor_columns: where they meet B.
        scale: what the elements of z are multiplied by on the way.
    """

    licence: Licence
    product: Product
    collective: Node
    local: Node
    local_dims: tuple[int, ...]
    width: int
    local_columns: tuple[int, ...]
    factor_columns: tuple[int, ...]
    scale: float


class Landing(Enum):
    """How a row path's slice of the result comes to the others."""

    PLACED = "placed"
    """It is added to this rank's columns of a value that an all-reduce sums."""
    GATHERED = "gathered"
    """All ranks' slices are gathered into the whole result."""


@dataclass(frozen=True, slots=True)
class RowPath:
    """A path with an all-reduce between its factors.

    Attributes:
        licence: for A.
        first, second: the products.
        collective: what the all-reduce gives (the wait).
        first_columns: the columns of z that are this rank's own part, in the order that B reads them.
        second_columns: for each rank the places of its part along the rank dim of B's parameter.
        second_rank_dim: that dim.
        landing: how the result comes to all ranks.
        result: the value of O features that the path is part of (placed), or that it is (gathered).
        features_first: whether the result lies as [O, ...].
        group: the process group.
        scale: what the result is multiplied by on the way.
    """

    licence: Licence
    first: Product
    second: Product
    collective: Node
    first_columns: tuple[int, ...]
    second_columns: tuple[tuple[int, ...], ...]
    second_rank_dim: int
    landing: Landing
    result: Node
    features_first: bool
    group: str
    scale: float


@dataclass(frozen=True, slots=True)
class LinearPath:
    """A path with an all-reduce between its factors whose B may be the same on every rank: no licence is needed then.

    Attributes:
        product: the second product.
        collective: what the all-reduce gives (the wait).
    """

    product: Product
    collective: Node


Path = ColumnPath | RowPath | LinearPath


def products(graph: Graph) -> list[Product]:
    """Products of data and a factor that is made of one parameter, in graph order."""
    return [found for node in graph.nodes if (found := product_of(node)) is not None]


def product_of(node: Node) -> Product | None:
    """The node as a product of data and of one parameter, None if it is no such product."""
    if operator_name(node) != "mm" or node.op != "call_function":
        return None
    first, second = node.args
    assert isinstance(first, Node), f"{node.name}: a product is of two values of the graph"
    assert isinstance(second, Node), f"{node.name}: a product is of two values of the graph"
    parameters = _parameter_of(first), _parameter_of(second)
    match parameters:
        case (None, Node() as parameter):
            return Product(node, first, second, parameter, data_first=True)
        case (Node() as parameter, None):
            return Product(node, second, first, parameter, data_first=False)
        case _:
            return None


def parameter_name(placeholder: Node) -> str:
    """The name of a parameter in the user's model."""
    source = record(placeholder).source
    return source.parameter if isinstance(source, ArgumentWeight) else placeholder.name


def _parameter_of(operand: Node) -> Node | None:
    """The parameter that an operand alone is made of, by moves and numbers."""
    origin = linear_origin(operand)
    is_parameter = len(origin) == 1 and isinstance(record(origin[0]).source, ArgumentWeight)
    return origin[0] if is_parameter else None


def path_name(path: Path) -> str:
    """A path is named by its second factor."""
    product = path.second if isinstance(path, RowPath) else path.product
    return parameter_name(product.parameter)
