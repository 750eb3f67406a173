"""Placement rules: which placements an operator needs of its operands, and which one its result then has.

One function a family of operators, one table by operator name. A rule answers with a `Ruling`, or with the reason why
the operator cannot run on pieces; partitioning then gathers the operands, which is always right, and reports it.

Shapes are those of the whole values; R replicated, P partial, S<dim>/<pieces> cut.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from bdlora_compile.ir import fake_tensor, is_tensor, operator_name, tensor_operands
from bdlora_compile.placement import Partial, Placement, Replicate, Shard

Size = int | torch.SymInt


@dataclass(frozen=True, slots=True)
class Ruling:
    """A way to run an operator on pieces.

    Attributes:
        operands: the placement that each tensor operand needs, in the order of `tensor_operands`.
        output: the placement of the result (of every member, if it is a tuple).
        sizes: literal arguments to change, by position: a size divided by the number of pieces.
    """

    operands: Sequence[Placement]
    output: Placement
    sizes: Mapping[int, object] = field(default_factory=dict)


Rule = Callable[[Node, Sequence[Placement]], Ruling | str]


def rule_for(node: Node) -> Rule | None:
    """The rule of the node's operator, None if there is none."""
    return _RULES.get(operator_name(node))


def replicated(node: Node, placements: Sequence[Placement]) -> Ruling:
    """What is right for every operator: all operands whole."""
    return Ruling([Replicate()] * len(placements), Replicate())


def _shard_of(placements: Sequence[Placement]) -> Shard | None:
    return next((placement for placement in placements if isinstance(placement, Shard)), None)


# --- pointwise ------------------------------------------------------------------------------------------------------

_SUMS = frozenset({"add", "sub"})
_SCALINGS = frozenset({"mul", "truediv", "div", "neg", "contiguous", "clone"})


def _pointwise(node: Node, placements: Sequence[Placement]) -> Ruling | str:
    """Broadcasting operators: cut operands stay cut, size-1 dims stay whole, whole operands are sliced."""
    operands = tensor_operands(node)
    if all(isinstance(placement, Partial) for placement in placements) and _keeps_sums(node, operands):
        return Ruling(list(placements), Partial())
    ndim = fake_tensor(node).ndim
    cuts = {_cut_in_output(operand, placement, ndim) for operand, placement in zip(operands, placements, strict=True)}
    cuts.discard(None)
    if len(cuts) > 1:
        return f"its operands are cut differently ({', '.join(sorted(str(cut) for cut in cuts))})"
    cut = cuts.pop() if cuts else None
    if cut is None:
        return replicated(node, placements)
    return Ruling([_aligned(operand, cut, ndim) for operand in operands], cut)


def _keeps_sums(node: Node, operands: Sequence[Node]) -> bool:
    """Whether f(a1 + a2) = f(a1) + f(a2) for this call: sums of tensors, and scaling by a number."""
    name = operator_name(node)
    if name in _SUMS:
        return len(operands) == 2
    return name in _SCALINGS and len(operands) == 1 and node.args[0] is operands[0]


def _cut_in_output(operand: Node, placement: Placement, ndim: int) -> Shard | None:
    if not isinstance(placement, Shard):
        return None
    return Shard(placement.dim + ndim - fake_tensor(operand).ndim, placement.pieces)


def _aligned(operand: Node, cut: Shard, ndim: int) -> Placement:
    value = fake_tensor(operand)
    dim = cut.dim - (ndim - value.ndim)
    is_broadcast = dim < 0 or value.shape[dim] == 1
    return Replicate() if is_broadcast else Shard(dim, cut.pieces)


# --- linear algebra -------------------------------------------------------------------------------------------------


def _linear(node: Node, placements: Sequence[Placement]) -> Ruling | str:
    """x W^T: W cut on O gives pieces of y; W and x cut on D give summands of y."""
    operands = tensor_operands(node)
    x, weight = operands[0], placements[1]
    last = fake_tensor(x).ndim - 1
    match weight:
        case Shard(0, pieces):
            bias = [Shard(0, pieces)] * (len(operands) - 2)
            return Ruling([Replicate(), weight, *bias], Shard(last, pieces))
        case Shard(1, pieces) if len(operands) == 2:
            return Ruling([Shard(last, pieces), weight], Partial())
        case Replicate():
            x_placement = placements[0]
            if isinstance(x_placement, Shard) and x_placement.dim != last:
                return Ruling([x_placement, *([Replicate()] * (len(operands) - 1))], x_placement)
            return replicated(node, placements)
        case _:
            return f"its weight has placement {weight}"


def _attention(node: Node, placements: Sequence[Placement]) -> Ruling | str:
    """Scaled dot-product attention on own heads: q and the result [B, H, S, d], k and v [B, H_kv, L, d]."""
    heads = _head_placements(node, placements)
    if isinstance(heads, str) or not heads:
        return heads or replicated(node, placements)
    mask = [_aligned(operand, heads[0], 4) for operand in tensor_operands(node)[3:]]
    return Ruling([*heads, *mask], heads[0])


def _row_attention(node: Node, placements: Sequence[Placement]) -> Ruling | str:
    """Attention over each row's own keys: as above, with a whole row table; the result is [B, S, H, d]."""
    heads = _head_placements(node, placements)
    if isinstance(heads, str) or not heads:
        return heads or replicated(node, placements)
    return Ruling([*heads, Replicate()], Shard(2, heads[0].pieces))


def _head_placements(node: Node, placements: Sequence[Placement]) -> tuple[Shard, Placement, Placement] | str | None:
    """Placements of q, k and v, all cut on heads; None if queries are whole, else why they cannot be so.

    Grouped kv heads may have fewer pieces than query heads: the kv head of rank k's query heads is k's own piece.
    """
    query, key, value = placements[:3]
    if not (isinstance(query, Shard) and query.dim == 1):
        return None if isinstance(query, Replicate) else f"its queries have placement {query}"
    own = [_own_heads(operand, query) for operand in tensor_operands(node)[1:3]]
    key, value = (
        heads if isinstance(given, Replicate) and heads is not None else given
        for given, heads in zip((key, value), own, strict=True)
    )
    for name, placement in (("keys", key), ("values", value)):
        if isinstance(placement, Replicate) and fake_tensor(tensor_operands(node)[1]).shape[1] == 1:
            continue
        if not (isinstance(placement, Shard) and placement.dim == 1 and query.pieces % placement.pieces == 0):
            return f"its {name} have placement {placement} while its queries have {query}"
    return query, key, value


def _own_heads(kv: Node, query: Shard) -> Placement | None:
    """What a rank needs of whole keys or values: the only head, or its piece of them; None if pieces do not fit."""
    heads = fake_tensor(kv).shape[1]
    if heads == 1:
        return Replicate()
    return Shard(1, query.pieces) if isinstance(heads, int) and heads % query.pieces == 0 else None


# --- reductions -----------------------------------------------------------------------------------------------------


def _reduction(node: Node, placements: Sequence[Placement]) -> Ruling | str:
    """Reduce over dims that are whole on every rank."""
    cut = _shard_of(placements)
    if cut is None:
        return replicated(node, placements)
    ndim = fake_tensor(tensor_operands(node)[0]).ndim
    dims = _dims(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"), ndim)
    if dims is None or cut.dim in dims:
        return f"it reduces over the dim that is cut ({cut})"
    is_kept = bool(node.kwargs.get("keepdim", False)) or operator_name(node) in ("softmax", "cumsum")
    shift = 0 if is_kept else sum(dim < cut.dim for dim in dims)
    return Ruling([cut], Shard(cut.dim - shift, cut.pieces))


def _dims(argument: object, ndim: int) -> set[int] | None:
    match argument:
        case bool() | None:
            return None
        case int():
            return {argument % ndim}
        case tuple() | list() if all(isinstance(dim, int) for dim in argument):
            return {int(dim) % ndim for dim in argument}
        case _:
            return None


# --- views ----------------------------------------------------------------------------------------------------------


def _reshape(node: Node, placements: Sequence[Placement]) -> Ruling | str:
    """A cut follows its dim through a split or a merge, as long as it stays the leftmost of its group."""
    cut = _shard_of(placements)
    if cut is None:
        return replicated(node, placements)
    source, target = list(fake_tensor(tensor_operands(node)[0]).shape), list(fake_tensor(node).shape)
    dim = _follow(source, target, cut)
    if dim is None:
        return f"its cut ({cut} of {source}) does not lie on one dim of {target}"
    return Ruling([cut], Shard(dim, cut.pieces), _divided_sizes(node, dim, cut.pieces))


def _follow(source: Sequence[Size], target: Sequence[Size], cut: Shard) -> int | None:
    """The dim of ``target`` that holds the cut of ``source``, None if none does."""
    for old, new in _groups(source, target):
        if cut.dim not in old:
            continue
        leading_old = next((dim for dim in old if source[dim] != 1), None)
        leading_new = next((dim for dim in new if target[dim] != 1), None)
        if leading_old != cut.dim or leading_new is None:
            return None
        size = target[leading_new]
        return leading_new if isinstance(size, int) and size % cut.pieces == 0 else None
    return None


def _groups(source: Sequence[Size], target: Sequence[Size]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dims of both shapes that hold the same elements, in order."""
    groups: list[tuple[list[int], list[int]]] = []
    old, new = 0, 0
    while old < len(source) and new < len(target):
        olds, news = [old], [new]
        left, right = source[old], target[new]
        old, new = old + 1, new + 1
        while not _same(left, right):
            if isinstance(left, int) and isinstance(right, int) and left < right and old < len(source):
                left, olds, old = left * source[old], [*olds, old], old + 1
            elif isinstance(left, int) and isinstance(right, int) and right < left and new < len(target):
                right, news, new = right * target[new], [*news, new], new + 1
            else:
                return []
        groups.append((olds, news))
    return groups


def _same(left: Size, right: Size) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    # Symbols are compared by their text: asking them would add a guard.
    return str(left) == str(right)


def _divided_sizes(node: Node, dim: int, pieces: int) -> dict[int, object]:
    """The size arguments of a view with the one for ``dim`` divided, unless it is -1 and follows by itself."""
    if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)):
        sizes = list(node.args[1])
        sizes[dim] = _divided(sizes[dim], pieces)
        return {1: tuple(sizes)}
    return {dim + 1: _divided(node.args[dim + 1], pieces)}


def _divided(size: object, pieces: int) -> object:
    return size // pieces if isinstance(size, int) and size != -1 else size


def _expand(node: Node, placements: Sequence[Placement]) -> Ruling | str:
    cut = _shard_of(placements)
    if cut is None:
        return replicated(node, placements)
    dim = cut.dim + fake_tensor(node).ndim - fake_tensor(tensor_operands(node)[0]).ndim
    return Ruling([cut], Shard(dim, cut.pieces), _divided_sizes(node, dim, cut.pieces))


def _transpose(node: Node, placements: Sequence[Placement]) -> Ruling | str:
    cut = _shard_of(placements)
    if cut is None:
        return _keep_partial(node, placements)
    ndim = fake_tensor(node).ndim
    first, second = (int(dim) % ndim for dim in node.args[1:3])  # type: ignore[call-overload,arg-type]  # literals
    swapped = {first: second, second: first}.get(cut.dim, cut.dim)
    return Ruling([cut], Shard(swapped, cut.pieces))


def _unsqueeze(node: Node, placements: Sequence[Placement]) -> Ruling | str:
    cut = _shard_of(placements)
    if cut is None:
        return _keep_partial(node, placements)
    dim = int(node.args[1]) % fake_tensor(node).ndim  # type: ignore[arg-type]  # a literal
    return Ruling([cut], Shard(cut.dim + (dim <= cut.dim), cut.pieces))


def _keep_partial(node: Node, placements: Sequence[Placement]) -> Ruling:
    if all(isinstance(placement, Partial) for placement in placements):
        return Ruling(list(placements), Partial())
    return replicated(node, placements)


def _cat(node: Node, placements: Sequence[Placement]) -> Ruling | str:
    cut = _shard_of(placements)
    if cut is None:
        return replicated(node, placements)
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if int(dim) % fake_tensor(node).ndim == cut.dim:  # type: ignore[arg-type]  # a literal
        return f"it joins on the dim that is cut ({cut})"
    # torch joins an empty [0] tensor with anything: transformers' DynamicCache starts from one.
    operands = [cut if fake_tensor(operand).ndim > 1 else Replicate() for operand in tensor_operands(node)]
    return Ruling(operands, cut)


def _split(node: Node, placements: Sequence[Placement]) -> Ruling | str:
    cut = _shard_of(placements)
    if cut is None:
        return replicated(node, placements)
    operand = tensor_operands(node)[0]
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    if int(dim) % fake_tensor(operand).ndim == cut.dim:  # type: ignore[arg-type]  # a literal
        return f"it splits the dim that is cut ({cut})"
    return Ruling([cut], cut)


def _getitem(node: Node, placements: Sequence[Placement]) -> Ruling | str:
    """A member of a tuple, or basic indexing that leaves the cut dim whole."""
    operand = node.args[0]
    if not (isinstance(operand, Node) and is_tensor(operand)):
        return Ruling(list(placements), placements[0])
    cut = _shard_of(placements)
    if cut is None:
        return replicated(node, placements)
    dim = _index_dim(node.args[1], cut.dim, fake_tensor(operand).ndim)
    return f"it indexes the dim that is cut ({cut})" if dim is None else Ruling([cut], Shard(dim, cut.pieces))


def _index_dim(index: object, cut_dim: int, ndim: int) -> int | None:
    """The result's dim that the operand's ``cut_dim`` becomes under basic indexing, None if it is not left whole."""
    members = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(member, Node) for member in members):
        return None
    used = sum(member is not None and member is not Ellipsis for member in members)
    position = next((at for at, member in enumerate(members) if member is Ellipsis), len(members))
    members[position : position + 1] = [slice(None)] * (ndim - used)
    source = target = 0
    for member in members:
        if member is None:
            target += 1
            continue
        if source == cut_dim:
            return target if isinstance(member, slice) and member == slice(None) else None
        source += 1
        target += isinstance(member, slice)
    return None


# --- table ----------------------------------------------------------------------------------------------------------

_POINTWISE = """
add sub mul truediv div neg pow rsqrt sqrt exp log sin cos tanh sigmoid silu gelu relu abs square reciprocal clamp
maximum minimum where masked_fill eq ne lt le gt ge and or xor invert logical_and logical_or logical_not
to float half double bfloat16 type type_as contiguous clone detach dropout
"""

_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_POINTWISE.split(), _pointwise),
    **dict.fromkeys(("mean", "sum", "max", "min", "amax", "softmax", "cumsum", "all", "any"), _reduction),
    **dict.fromkeys(("view", "reshape", "flatten"), _reshape),
    **dict.fromkeys(("split", "chunk"), _split),
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "bdlora::attention": _row_attention,
    "expand": _expand,
    "transpose": _transpose,
    "unsqueeze": _unsqueeze,
    "cat": _cat,
    "getitem": _getitem,
    "layer_boundary": lambda node, placements: replicated(node, placements),
}
