"""Match a LoRA path with an all-reduce: a rank's own columns of z, what ranks need of B, where the result lands."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from bdlora_compile.collectives import ALL_GATHER, ALL_REDUCE, is_collective
from bdlora_compile.dataflow import PLACINGS, NotFollowedError, Probe, linear_origin, linear_reach, probe, view_sizes
from bdlora_compile.foreign.match_column import Side, as_rows, factor_places, licence_of, one_for_each_column
from bdlora_compile.foreign.paths import GroupMember, Landing, Product, RowPath, product_of
from bdlora_compile.foreign.without import rest_without
from bdlora_compile.ir import operator_name

_READERS = PLACINGS | {ALL_REDUCE, ALL_GATHER, "cat"}
"""What may read a row path's product once it was moved and scaled."""


def match_row(second: Product, wait: Node, member: GroupMember) -> RowPath | None:
    """The row path that ends with ``second``; None if its result is added as it is (B has all O rows).

    Raises:
        NotFollowedError: it lands somewhere else, its elements are moved in another way, or A has no licence.
    """
    collective = wait.all_input_nodes[0]
    group = str(collective.args[-1])
    landed = _landing(second, member, group)
    if landed is None:
        return None
    view_sizes(landed.result)
    first = _first_product(collective)
    given = collective.args[0]
    assert isinstance(given, Node), "a collective is of a value of the graph"
    before, between = probe(first.node, given, alone=True), probe(wait, second.data, alone=True)
    columns = _first_columns(before, as_rows(between.index, second), first)
    a, b = factor_places(first, Side.OUTER), factor_places(second, Side.INNER)
    if not b.is_in_order:
        raise NotFollowedError("the output features of its second factor are reordered before the product")
    licence = licence_of(first.parameter, a.rank_dim, member)
    share = licence.stop - licence.start
    parts = [
        [at for at, column in enumerate(columns) if a.along[column] // share == rank] for rank in range(member.size)
    ]
    return RowPath(
        licence=licence,
        first=first,
        second=second,
        collective=wait,
        first_columns=tuple(columns[at] for at in parts[member.rank]),
        second_columns=tuple(tuple(b.along[at] for at in part) for part in parts),
        second_rank_dim=b.rank_dim,
        landing=landed.how,
        result=landed.result,
        features_first=landed.features_first,
        group=group,
        scale=before.factor * between.factor * b.scale * landed.scale,
    )


@dataclass(frozen=True, slots=True)
class _Landed:
    result: Node
    how: Landing
    features_first: bool
    scale: float


def _first_product(collective: Node) -> Product:
    given = collective.args[0]
    assert isinstance(given, Node), "a collective is of a value of the graph"
    begins = linear_origin(given)
    if len(begins) != 1:
        raise NotFollowedError("several products share the all-reduce between its factors")
    first = product_of(begins[0])
    if first is None:
        raise NotFollowedError(f"{begins[0].name} ({operator_name(begins[0])}) is summed, no product with a factor")
    return first


def _first_columns(before: Probe, reduced: Tensor, first: Product) -> list[int]:
    """For each column of [T, W] the column of the first product's result that comes there."""
    element = before.index.reshape(-1)[reduced]
    width = first.num_features if first.data_first else first.num_tokens
    row, column = element // width, element % width
    if not first.data_first:
        row, column = column, row
    expected = torch.arange(first.num_tokens)[:, None]
    if element.shape[0] != first.num_tokens or not (row == expected).all():
        raise NotFollowedError("tokens are mixed between its factors")
    found = one_for_each_column(column, "columns are mixed between its factors")
    return [int(place) for place in found]


def _landing(second: Product, member: GroupMember, group: str) -> _Landed | None:
    """Where the product's slice of the result goes; None if the product's result is no slice."""
    _, direct = linear_reach(second.node, alone=True)
    others = [node for node in direct if operator_name(node) not in _READERS]
    if others:
        raise NotFollowedError(f"{others[0].name} ({operator_name(others[0])}) reads its result before it is added")
    reached, readers = linear_reach(second.node)
    if len(readers) == 1 and is_collective(readers[0]) and str(readers[0].args[-1]) != group:
        raise NotFollowedError("its result is communicated in another process group than its factors")
    if len(readers) == 1 and operator_name(readers[0]) == ALL_REDUCE and readers[0].args[1] == "sum":
        return _placed(second, readers[0], member)
    if len(readers) == 1 and operator_name(readers[0]) == ALL_GATHER:
        return _gathered(second, readers[0], member)
    if any(operator_name(node) in ("slice_scatter", "select_scatter", "constant_pad_nd") for node in reached):
        raise NotFollowedError("its slice of the result is not summed by the all-reduce of the layer")
    return None


def _placed(second: Product, reduce: Node, member: GroupMember) -> _Landed | None:
    result = reduce.args[0]
    assert isinstance(result, Node), "a collective is of a value of the graph"
    found = probe(second.node, result, alone=False)
    features = second.num_features
    tables = {features_first: _table(found.index, features_first) for features_first in (False, True)}
    if any(table.shape[1] == features and _is_in_order(table, second) for table in tables.values()):
        return None
    start = member.rank * features
    for features_first, table in tables.items():
        own = table[:, start : start + features]
        is_elsewhere = (table >= 0).sum() != own.numel()
        if table.shape[1] == features * member.size and not is_elsewhere and _is_in_order(own, second):
            rest_without(second.node, result)
            return _Landed(result, Landing.PLACED, features_first, found.factor)
    raise NotFollowedError(f"it is not added to columns {start}:{start + features}, this rank's part of the result")


def _gathered(second: Product, gather: Node, member: GroupMember) -> _Landed:
    given = gather.args[0]
    assert isinstance(given, Node), "a collective is of a value of the graph"
    (wait,) = gather.users
    # What is added to the base result: the last value that is made of the gathered one alone.
    moved, _ = linear_reach(wait, alone=True)
    exits = [node for node in moved if any(user not in moved for user in node.users)]
    if len(exits) != 1:
        raise NotFollowedError("the gathered result is read in several ways")
    before, after = probe(second.node, given, alone=True), probe(wait, exits[0], alone=True)
    size = before.index.numel()
    origin, element = after.index // size, before.index.reshape(-1)[after.index % size]
    for features_first in (False, True):
        if _is_by_rank(_table(origin, features_first), _table(element, features_first), second, member):
            return _Landed(exits[0], Landing.GATHERED, features_first, before.factor * after.factor)
    raise NotFollowedError("the gathered result does not hold the ranks' columns one after the other")


def _is_by_rank(origin: Tensor, element: Tensor, second: Product, member: GroupMember) -> bool:
    """Whether columns of [T, O] are those of rank 0, then those of rank 1, and so on."""
    features = second.num_features
    parts = [slice(rank * features, (rank + 1) * features) for rank in range(member.size)]
    return origin.shape[1] == features * member.size and all(
        bool((origin[:, part] == rank).all()) and _is_in_order(element[:, part], second)
        for rank, part in enumerate(parts)
    )


def _table(index: Tensor, features_first: bool) -> Tensor:
    """[..., O] or [O, ...] as [T, O]."""
    return index.flatten(1).t() if features_first else index.reshape(-1, index.shape[-1])


def _is_in_order(index: Tensor, product: Product) -> bool:
    """Whether [T, O] holds the elements of a product's result as they are."""
    tokens, features = product.num_tokens, product.num_features
    expected = torch.arange(tokens * features)
    own = expected.view(tokens, features) if product.data_first else expected.view(features, tokens).t()
    return index.shape == own.shape and bool((index == own).all())
