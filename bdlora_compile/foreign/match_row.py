"""Match a LoRA path with an all-reduce: a rank's own columns of z, what ranks need of B, where the result lands."""

import torch
from torch import Tensor
from torch.fx import Node

from bdlora_compile.collectives import ALL_GATHER, ALL_REDUCE
from bdlora_compile.dataflow import NotFollowedError, Probe, concrete, linear_origin, linear_reach, probe, view_sizes
from bdlora_compile.foreign.match_column import Side, as_rows, licence_of, one_for_each_column, rank_places
from bdlora_compile.foreign.paths import GroupMember, Landing, Product, RowPath, product_of
from bdlora_compile.foreign.without import rest_without
from bdlora_compile.ir import fake_tensor, operator_name


def match_row(second: Product, wait: Node, member: GroupMember) -> RowPath | None:
    """The row path that ends with ``second``; None if its result is added as it is (B has all O rows).

    Raises:
        NotFollowedError: it lands somewhere else, its elements are moved in another way, or A has no licence.
    """
    features = concrete(fake_tensor(second.node).numel()) // _tokens(second)
    landing = _landing(second, features, member)
    if landing is None:
        return None
    result, how, landed = landing
    view_sizes(result)
    collective = wait.all_input_nodes[0]
    first = _first_product(collective)
    given = collective.args[0]
    assert isinstance(given, Node), "a collective is of a value of the graph"
    before, between = probe(first.node, given, alone=True), probe(wait, second.data, alone=True)
    columns = _first_columns(before, as_rows(between.index, second), first)
    places, rank_dim = rank_places(first, Side.OUTER)
    licence = licence_of(first.parameter, rank_dim, member)
    share = licence.stop - licence.start
    parts = [
        [at for at, column in enumerate(columns) if places[column] // share == rank] for rank in range(member.size)
    ]
    second_places, second_dim = rank_places(second, Side.INNER)
    return RowPath(
        licence=licence,
        first=first,
        second=second,
        collective=wait,
        first_columns=tuple(columns[at] for at in parts[member.rank]),
        second_columns=tuple(tuple(second_places[at] for at in part) for part in parts),
        second_rank_dim=second_dim,
        landing=how,
        result=result,
        group=str(collective.args[-1]),
        scale=before.factor * between.factor * landed,
    )


def _tokens(product: Product) -> int:
    shape = fake_tensor(product.data).shape
    return concrete(shape[-2] if product.data_first else shape[-1])


def _first_product(collective: Node) -> Product:
    given = collective.args[0]
    assert isinstance(given, Node), "a collective is of a value of the graph"
    begins = linear_origin(given)
    if len(begins) != 1:
        raise NotFollowedError("several products share the all-reduce between its factors")
    first = product_of(begins[0])
    assert first is not None, "a path begins with a product"
    if operator_name(first.node) in ("addmm", "baddbmm"):
        raise NotFollowedError("its first factor has a bias")
    return first


def _first_columns(before: Probe, reduced: Tensor, first: Product) -> list[int]:
    """For each column of [T, W] the column of the first product's result that comes there."""
    element = before.index.reshape(-1)[reduced]
    shape = fake_tensor(first.node).shape
    rows, width = concrete(shape[-2]), concrete(shape[-1])
    row, column = element // width, element % width
    if not first.data_first:
        row, column, rows = column, row, width
    expected = torch.arange(rows)[:, None]
    if element.shape[0] != rows or not (row == expected).all():
        raise NotFollowedError("tokens are mixed between its factors")
    found = one_for_each_column(column, "columns are mixed between its factors")
    return [int(place) for place in found]


def _landing(second: Product, features: int, member: GroupMember) -> tuple[Node, Landing, float] | None:
    """(the result of all features, how it lands, its scale); None if the product's result is no slice."""
    reached, readers = linear_reach(second.node)
    if len(readers) == 1 and operator_name(readers[0]) == ALL_REDUCE and readers[0].args[1] == "sum":
        result = readers[0].args[0]
        assert isinstance(result, Node), "a collective is of a value of the graph"
        return _placed(second, result, features, member)
    if len(readers) == 1 and operator_name(readers[0]) == ALL_GATHER:
        return _gathered(second, readers[0], features, member)
    if any(operator_name(node) in ("slice_scatter", "select_scatter", "constant_pad_nd") for node in reached):
        raise NotFollowedError("its slice of the result is not summed by the all-reduce of the layer")
    return None


def _placed(second: Product, result: Node, features: int, member: GroupMember) -> tuple[Node, Landing, float] | None:
    found = probe(second.node, result, alone=False)
    table = found.index.reshape(-1, found.index.shape[-1])
    if table.shape[1] == features:
        return None
    start = member.rank * features
    own = table[:, start : start + features]
    is_elsewhere = (table >= 0).sum() != own.numel()
    if table.shape[1] != features * member.size or is_elsewhere or not _is_in_order(own, second):
        raise NotFollowedError(f"it is not added to columns {start}:{start + features}, this rank's part of the result")
    rest_without(second.node, result)
    return result, Landing.PLACED, found.factor


def _gathered(second: Product, gather: Node, features: int, member: GroupMember) -> tuple[Node, Landing, float]:
    given = gather.args[0]
    assert isinstance(given, Node), "a collective is of a value of the graph"
    (wait,) = gather.users
    # What is added to the base result: the last value that is made of the gathered one alone.
    moved, _ = linear_reach(wait, alone=True)
    exits = [node for node in moved if any(user not in moved for user in node.users)]
    if len(exits) != 1:
        raise NotFollowedError("the gathered result is read in several ways")
    before, after = probe(second.node, given, alone=True), probe(wait, exits[0], alone=True)
    table = after.index.reshape(-1, after.index.shape[-1])
    size = concrete(fake_tensor(given).numel())
    for rank in range(member.size):
        part = table[:, rank * features : (rank + 1) * features]
        element = before.index.reshape(-1)[(part - rank * size).clamp(0, size - 1)]
        if (
            table.shape[1] != features * member.size
            or not ((part // size) == rank).all()
            or not _is_in_order(element, second)
        ):
            raise NotFollowedError("the gathered result does not hold the ranks' columns one after the other")
    return exits[0], Landing.GATHERED, before.factor * after.factor


def _is_in_order(index: Tensor, product: Product) -> bool:
    """Whether [T, O] holds the elements of a product's result as they are."""
    shape = fake_tensor(product.node).shape
    rows, columns = concrete(shape[-2]), concrete(shape[-1])
    expected = torch.arange(rows * columns).reshape(rows, columns)
    expected = expected if product.data_first else expected.t()
    return index.shape == expected.shape and bool((index == expected).all())
