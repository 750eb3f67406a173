"""What lies between the product of q, k and v and attention, as one operator: rotations and the write to the cache.

    Before:  q, k, v = narrow(y, ...), each as heads: transpose(reshape(...), 1, 2)
             q2, k2 = q * cos + turned(q) * sin, k * cos + turned(k) * sin
             cache_write_(keys, values, k2, v, lengths)
    After:   q2 = bdlora::rotate_and_cache(y, cos, sin, keys, values, lengths, heads of q, heads of k)

For graphs of GPUs, where it is one kernel.
"""

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from bdlora_compile.ir import CacheSource, fake_tensor, fake_value, operator_name, record, set_record, stage_nodes
from bdlora_compile.lora_nodes import CacheWriteArguments, RotateArguments
from bdlora_compile.mutation import written_operands
from bdlora_compile.pass_manager import erase_with_operands
from bdlora_compile.propagation import number_key
from bdlora_compile.report import PassStats, Refusal
from bdlora_compile.runtime import rotary_op  # noqa: F401 - registers its operators

_WRITE = "bdlora::cache_write_"
_ATTENTION = "bdlora::attention"


@dataclass(frozen=True, slots=True)
class _Part:
    """Heads of q, of k or of v: columns of a product, [B, n, S, d].

    Attributes:
        whole: y, [B, S, all columns].
        start, heads, dim: its first column, n and d.
        nodes: what makes it of y, the first one first.
    """

    whole: Node
    start: int
    heads: int
    dim: int
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class _Rotation:
    """``result`` = heads * cos + turned(heads) * sin; ``nodes`` are those between, the result among them."""

    result: Node
    heads: Node
    cos: Node
    sin: Node
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """A write to the cache, attention behind it, the rotations of q and k before it, and the parts of y: q, k and v."""

    write: Node
    attention: Node
    query: _Rotation
    key: _Rotation
    parts: tuple[_Part, _Part, _Part]


def fuse_rotary(graph: Graph) -> PassStats:
    """Rewrite all writes to the cache of a graph for which it can be done; the others say why not."""
    writes = [*stage_nodes(graph, _WRITE)]
    refusals = []
    for write in writes:
        place = _place(write)
        if isinstance(place, _Place):
            _rewrite(graph, place)
        else:
            refusals.append(Refusal(_where(write), place))
    graph.lint()
    return PassStats(matches=len(writes) - len(refusals), refusals=refusals)


def _where(write: Node) -> str:
    source = record(CacheWriteArguments.of(write).keys).source
    return f"cache of layer {source.layer}" if isinstance(source, CacheSource) else write.name


def _place(write: Node) -> _Place | str:
    """What is before a write to the cache, or why it stays by itself."""
    written = CacheWriteArguments.of(write)
    attention = _attention_behind(write)
    if attention is None:
        return "the cache is read otherwise than by one attention"
    q = attention.args[0]
    assert isinstance(q, Node), "queries are a tensor"
    query, key = _rotation(q), _rotation(written.k)
    if query is None or key is None:
        return f"{'k' if query else 'q'} is not heads rotated as a whole"
    if (query.cos, query.sin) != (key.cos, key.sin):
        return "q and k are rotated by different angles"
    parts = [_part(heads) for heads in (query.heads, key.heads, written.v)]
    q_part, k_part, v_part = parts
    if q_part is None or k_part is None or v_part is None:
        return "q, k and v are no heads of columns of a product"
    place = _Place(write, attention, query, key, (q_part, k_part, v_part))
    return _unlike(place) or place


def _unlike(place: _Place) -> str:
    """Why parts that are what they should be by themselves are not so together; empty if they are."""
    q, k, v = place.parts
    keys, y = fake_tensor(CacheWriteArguments.of(place.write).keys), q.whole
    (groups, _, dim), columns = keys.shape[1:], fake_tensor(y).shape[-1]
    starts = [0, q.heads * dim, (q.heads + k.heads) * dim, columns]
    if k.whole is not y or v.whole is not y or [q.start, k.start, v.start, (q.heads + 2 * k.heads) * dim] != starts:
        return "q, k and v are not all of one product, side by side"
    if {k.heads, v.heads} != {groups} or {q.dim, k.dim, v.dim} != {dim} or keys.dtype != fake_tensor(y).dtype:
        return "the cache has other heads or another dtype"
    if not all(_are_angles(angles, y, int(dim)) for angles in (place.query.cos, place.query.sin)):
        return "cos or sin has another shape or dtype than heads of q and k"
    if _is_read_elsewhere(place):
        return "what lies between q, k, v and attention is read elsewhere too"
    first = min(part.nodes[0] for part in place.parts)
    if any(y in written_operands(user) and not user < first for user in y.users):
        return "the product is written to after it was read"
    return ""


def _is_read_elsewhere(place: _Place) -> bool:
    """Whether others read what goes away."""
    inner = {*place.query.nodes, *place.key.nodes, *(node for part in place.parts for node in part.nodes)}
    readers = {user for node in inner for user in node.users}
    return not readers <= {*inner, place.write, place.attention}


def _attention_behind(write: Node) -> Node | None:
    """The one attention that reads what a write wrote to, and nothing else reads it."""
    written = CacheWriteArguments.of(write)
    caches = (written.keys, written.values)
    reads: list[Node] = []
    for cache in caches:
        pending = [user for user in cache.users if user is not write]
        while pending:
            user = pending.pop()
            if operator_name(user) == "view_as":
                pending += user.users
            else:
                reads.append(user)
    found = {*reads}
    attention = found.pop() if len(found) == 1 else None
    if attention is None or operator_name(attention) != _ATTENTION or not write < attention or write.users:
        return None
    return attention if tuple(map(_seen, attention.args[1:3])) == caches else None


def _seen(view: object) -> object:
    """What a view of all of a tensor is a view of."""
    while isinstance(view, Node) and operator_name(view) == "view_as":
        view = view.args[0]
    return view


def _rotation(result: Node) -> _Rotation | None:
    """add(mul(heads, unsqueeze(cos, 1)), mul(cat((neg(second half), first half), dim=-1), unsqueeze(sin, 1)))."""
    straight, across = _two_operands(result, "add")
    heads, cos = _two_operands(straight, "mul")
    turned, sin = _two_operands(across, "mul")
    halves = _turned(turned)
    if straight is None or across is None or turned is None or heads is None or halves is None:
        return None
    own_cos, own_sin = (_only_operand(angles, "unsqueeze", (1,)) for angles in (cos, sin))
    if own_cos is None or own_sin is None or any(half.args[0] is not heads for half in halves[-2:]):
        return None
    return _Rotation(result, heads, own_cos, own_sin, (*halves, turned, straight, across, result))


def _turned(joined: Node | None) -> tuple[Node, Node, Node] | None:
    """(negation, second half, first half) of what is put together as (-second half, first half)."""
    pieces = joined.args[0] if joined is not None and operator_name(joined) == "cat" and joined.args else None
    if joined is None or not isinstance(pieces, (tuple, list)) or len(pieces) != 2:
        return None
    negated, low = pieces
    if not isinstance(negated, Node) or operator_name(negated) != "neg" or len(negated.args) != 1:
        return None
    high = negated.args[0]
    half = fake_tensor(joined).shape[-1] // 2
    is_last = (joined.args[1:], joined.kwargs) in (((), {"dim": -1}), ((-1,), {}))
    if not is_last or not isinstance(high, Node) or not isinstance(low, Node):
        return None
    are_halves = _is_slice(low, slice(None, half, None)) and _is_slice(high, slice(half, None, None))
    return (negated, high, low) if are_halves else None


def _is_slice(node: Node, last: slice) -> bool:
    """Whether the node is some columns of its operand's last dim."""
    index = node.args[1] if operator_name(node) == "getitem" else None
    return isinstance(index, (tuple, list)) and [*index] == [Ellipsis, last]


def _part(heads: Node) -> _Part | None:
    """transpose(reshape(narrow(y, -1, start, columns), (B, S, -1, d)), 1, 2)."""
    rows = _only_operand(heads, "transpose", (1, 2))
    columns = rows.args[0] if rows is not None and operator_name(rows) in ("reshape", "view") else None
    if rows is None or not isinstance(columns, Node) or operator_name(columns) != "narrow" or columns.kwargs:
        return None
    y, dim, start, length = columns.args
    if not isinstance(y, Node) or dim not in (-1, 2) or not isinstance(start, int) or not isinstance(length, int):
        return None
    whole, shape = fake_tensor(y), fake_tensor(rows).shape
    # Rows and tokens as before, each token's columns cut into heads: there is one way to do that.
    is_cut = (
        whole.ndim == 3 and len(shape) == 4 and [*map(number_key, shape[:2])] == [*map(number_key, whole.shape[:2])]
    )
    return _Part(y, start, int(shape[2]), int(shape[3]), (columns, rows, heads)) if is_cut else None


def _are_angles(node: Node, y: Node, dim: int) -> bool:
    """Whether a node is [1 or B, S, d] for y [B, S, ...], of its dtype."""
    angles, whole = fake_value(node), fake_tensor(y)
    if not isinstance(angles, torch.Tensor) or angles.ndim != 3 or angles.dtype != whole.dtype:
        return False
    rows, seq, own_dim = map(number_key, angles.shape)
    return rows in (1, number_key(whole.shape[0])) and seq == number_key(whole.shape[1]) and own_dim == dim


def _two_operands(node: Node | None, name: str) -> tuple[Node | None, Node | None]:
    """Those of an operator of two tensors; None for both where the node is none."""
    if node is None or operator_name(node) != name or len(node.args) != 2 or node.kwargs:
        return None, None
    first, second = node.args
    return (first, second) if isinstance(first, Node) and isinstance(second, Node) else (None, None)


def _only_operand(node: Node | None, name: str, rest: tuple[int, ...]) -> Node | None:
    """The tensor of an operator with just these other arguments."""
    if node is None or operator_name(node) != name or node.args[1:] != rest or node.kwargs:
        return None
    return node.args[0] if isinstance(node.args[0], Node) else None


def _rewrite(graph: Graph, place: _Place) -> None:
    q, k, _ = place.parts
    written = CacheWriteArguments.of(place.write)
    query, key = place.query, place.key
    with graph.inserting_before(place.write):
        arguments = RotateArguments.taken_from(written, query, y=q.whole, heads=q.heads, kv_heads=k.heads)
        fused = arguments.insert(graph)
    fused.meta = dict(query.result.meta)
    set_record(fused, stage="emit")
    query.result.replace_all_uses_with(fused)
    graph.erase_node(place.write)
    for node in (query.result, key.result, written.v):
        erase_with_operands(graph, node)
