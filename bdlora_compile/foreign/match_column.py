"""Match a LoRA path with a gather: which columns of what a rank gathers are its own, and where B reads them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.fx import Node

from bdlora_compile.dataflow import NotFollowedError, concrete, probe
from bdlora_compile.declared import BlockDiagonal
from bdlora_compile.foreign.paths import ColumnPath, GroupMember, Licence, Product
from bdlora_compile.ir import ArgumentWeight, fake_tensor, record


def match_column(product: Product, wait: Node, member: GroupMember) -> ColumnPath:
    """The column path that ends with ``product``.

    Raises:
        NotFollowedError: its elements are not moved column by column, or B has no licence.
    """
    local = wait.all_input_nodes[0].args[0]
    assert isinstance(local, Node), "a gather is of a value of the graph"
    found = probe(wait, product.data, alone=True)
    index = as_rows(found.index, product)
    size = concrete(fake_tensor(local).numel())
    origin, place = index // size, index % size
    ranks = one_for_each_column(origin, "ranks' shares are mixed within a column")
    arranged = _arrange(place, local)
    own = [column for column in range(index.shape[1]) if int(ranks[column]) == member.rank]
    factor = factor_places(product, Side.INNER)
    licence = licence_of(product.parameter, factor.rank_dim, member)
    if sorted(factor.along[column] for column in own) != list(range(licence.start, licence.stop)):
        raise NotFollowedError(
            f"this rank's share of the gathered h meets other columns of B than its part "
            f"{licence.start}:{licence.stop} of the adapter's rank"
        )
    return ColumnPath(
        licence=licence,
        product=product,
        collective=wait,
        local=local,
        local_dims=arranged.dims,
        width=arranged.width,
        local_columns=tuple(int(arranged.columns[column]) for column in own),
        factor_columns=tuple(own),
        scale=found.factor,
    )


def as_rows(index: Tensor, product: Product) -> Tensor:
    """Where the elements of a product's data come from, [T, W]."""
    if (index < 0).any():
        raise NotFollowedError("some elements between its factors come from nowhere")
    return index if product.data_first else index.t()


def one_for_each_column(values: Tensor, otherwise: str) -> Tensor:
    """The one value in each column of [T, W]."""
    if not (values == values[:1]).all():
        raise NotFollowedError(otherwise)
    return values[0]


class Side(Enum):
    """Where the adapter's rank lies in a factor."""

    INNER = "inner"
    """In the dim that the product sums over: a second factor, B."""
    OUTER = "outer"
    """In the other one: a first factor, A."""


@dataclass(frozen=True, slots=True)
class FactorPlaces:
    """How a product's factor is made of its parameter.

    Attributes:
        along: for each place along the adapter's rank in the factor that in the parameter, each once.
        rank_dim: the dim of the parameter that is the rank.
        is_in_order: whether the places along the other dim are those of the parameter, in order.
        scale: what the parameter is multiplied by.
    """

    along: list[int]
    rank_dim: int
    is_in_order: bool
    scale: float


def factor_places(product: Product, side: Side) -> FactorPlaces:
    """Probe the way from a parameter to the factor of a product.

    Raises:
        NotFollowedError: the factor does not consist of the parameter's rows or columns.
    """
    parameter = fake_tensor(product.parameter)
    if parameter.ndim != 2:
        raise NotFollowedError("its factor is no matrix")
    found = probe(product.parameter, product.factor, alone=True)
    # Rows are the places along the rank: the inner dim of [W, O] is the first, the outer one the second.
    matrix = found.index.t() if product.data_first == (side is Side.OUTER) else found.index
    size = concrete(parameter.shape[1])
    for dim, along, across in ((0, matrix // size, matrix % size), (1, matrix % size, matrix // size)):
        if (along == along[:, :1]).all() and (across == across[:1]).all():
            places = [int(place) for place in along[:, 0]]
            if len(set(places)) != len(places):
                raise NotFollowedError("parts of its factor are used more than once")
            other = concrete(parameter.shape[1 - dim])
            is_in_order = across[0].tolist() == list(range(other))
            return FactorPlaces(places, dim, is_in_order, found.factor)
    raise NotFollowedError("the rows of its factor are mixed before the product")


def licence_of(parameter: Node, rank_dim: int, member: GroupMember) -> Licence:
    """What the owner's declaration of a factor allows.

    Raises:
        NotFollowedError: nothing was declared, or the blocks do not fit the ranks.
    """
    source = record(parameter).source
    assert isinstance(source, ArgumentWeight), "a product's factor is made of a parameter"
    declared = source.declared
    if not isinstance(declared, BlockDiagonal):
        raise NotFollowedError(
            f"{source.parameter} is not declared block-diagonal (bdlora_compile.declare_block_diagonal)"
        )
    total = concrete(fake_tensor(parameter).shape[rank_dim])
    if declared.nblocks % member.size or total % declared.nblocks:
        raise NotFollowedError(
            f"{source.parameter} has {declared.nblocks} blocks on rank {total}: they do not divide among "
            f"{member.size} ranks"
        )
    share = total // member.size
    start = member.rank * share
    return Licence(parameter, source.parameter, declared.nblocks, rank_dim, start, start + share)


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """How z [...] becomes [T, W].

    Attributes:
        dims: its dims in another order: those of tokens, then those of columns.
        width: W.
        columns: the column of z that comes to each column of the product's data.
    """

    dims: tuple[int, ...]
    width: int
    columns: Tensor


def _arrange(place: Tensor, local: Node) -> _Arrangement:
    """Find the order of z's dims in which tokens and columns come to the product.

    Args:
        place: for each element of the product's data [T, W] the element of flat z that lies there.
    """
    shape = [concrete(size) for size in fake_tensor(local).shape]
    coordinates = torch.unravel_index(place, shape)
    of_columns = [dim for dim, along in enumerate(coordinates) if bool((along == along[:1]).all()) and shape[dim] > 1]
    of_tokens = [dim for dim in range(len(shape)) if dim not in of_columns]
    if not all(bool((coordinates[dim] == coordinates[dim][:, :1]).all()) for dim in of_tokens):
        raise NotFollowedError("what is gathered does not come column by column to its second factor")
    # The dim that changes last is the outermost one.
    of_tokens.sort(key=lambda dim: -_first_change(coordinates[dim][:, 0]))
    row, column = (_flat(coordinates, dims, shape, place) for dims in (of_tokens, of_columns))
    if not (row == torch.arange(place.shape[0])[:, None]).all():
        raise NotFollowedError("tokens come in another order to its second factor")
    width = math.prod(shape[dim] for dim in of_columns)
    return _Arrangement((*of_tokens, *of_columns), width, column[0])


def _first_change(values: Tensor) -> int:
    changed = (values != values[0]).nonzero()
    return int(changed[0]) if len(changed) else 0


def _flat(coordinates: Sequence[Tensor], dims: Sequence[int], shape: Sequence[int], like: Tensor) -> Tensor:
    """The number of an element among ``dims``, the last one counting fastest."""
    number = torch.zeros_like(like)
    for dim in dims:
        number = number * shape[dim] + coordinates[dim]
    return number
