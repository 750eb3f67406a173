"""What a value of a graph is made of: cones of linear operators, and where each element of a value goes in them.

Code that people write by hand moves, scales and places values in many ways: chunk and cat, transposes, slices, padding,
writes into a slice. Instead of a pattern for each, a cone is *probed*: its operators run on the numbers 1, 2, 3, ... in
place of the source's elements, and what comes out says which element lies where, and times what factor. This is exact
for linear operators, whatever they are called and in whatever order they stand.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from bdlora_compile.ir import fake_tensor, fake_value, is_symbol, is_tensor, operator_name, tensor_operands
from bdlora_compile.propagation import number_key

_MOVES = """
view _unsafe_view reshape flatten transpose t permute unsqueeze squeeze expand slice select narrow
split split_with_sizes chunk unbind getitem cat stack clone contiguous alias detach _to_copy to
"""

MOVES = frozenset(_MOVES.split())
"""Operators whose result consists of elements of their operands."""

SCALINGS = frozenset(("mul", "div", "truediv", "neg"))
"""Linear in their one tensor operand, if the other is a number."""

PLACINGS = frozenset(("add", "sub", "slice_scatter", "select_scatter", "constant_pad_nd"))
"""Linear in all of their tensor operands together."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Where elements of a source lie in a value that is linear in it.

    Attributes:
        index: int64, the shape of the value: which element of the flat source lies there, -1 for none.
        factor: what it is multiplied by.
    """

    index: Tensor
    factor: float


class NotFollowedError(Exception):
    """A value depends on another in a way that cannot be followed; the text says where and why."""


def is_linear_step(node: Node) -> bool:
    """Whether the node is one of the operators that probing follows, called so that it is linear."""
    name = operator_name(node)
    tensors = [argument for argument in node.args if isinstance(argument, Node) and is_tensor(argument)]
    match name:
        case "constant_pad_nd":
            return len(node.args) < 3 or node.args[2] in (0, 0.0)
        case "add" | "sub":
            return len(tensors) == 2
        case "mul":
            return len(tensors) == 1
        case "div" | "truediv":
            # A number over a tensor is not linear.
            return tensors == [node.args[0]] and "rounding_mode" not in node.kwargs
        case _:
            return name in MOVES or name in PLACINGS or name in SCALINGS


def cone(source: Node, value: Node) -> list[Node]:
    """Nodes on the ways from ``source`` (left out) to ``value``, in graph order."""
    # What lies outside their stretch of the graph is on no way: without this a walk would see the whole model.
    before = _reach([value], lambda node: [operand for operand in node.all_input_nodes if operand >= source])
    after = _reach([source], lambda node: [user for user in node.users if user <= value])
    return sorted(node for node in before & after if node is not source and not is_symbol(node))


def linear_reach(source: Node, *, alone: bool = False) -> tuple[list[Node], list[Node]]:
    """(all that linear steps make of ``source``, in graph order; the nodes that read of it otherwise).

    ``alone``: without what it is summed with other values in.
    """
    inside = {source}
    steps = _reach([source], lambda node: [user for user in node.users if is_linear_step(user)])
    for node in sorted(steps):
        is_sum = operator_name(node) in PLACINGS or not all(operand in inside for operand in tensor_operands(node))
        if not (alone and is_sum):
            inside.add(node)
    ordered = sorted(inside)
    return ordered, list(dict.fromkeys(user for node in ordered for user in node.users if user not in inside))


def linear_origin(value: Node) -> list[Node]:
    """The nodes that ``value`` is made of by linear steps, and that are none themselves."""
    found: list[Node] = []
    pending, seen = [value], {value}
    while pending:
        node = pending.pop(0)
        if not is_linear_step(node):
            found.append(node)
            continue
        for operand in tensor_operands(node):
            if operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return found


def probe(source: Node, value: Node, *, alone: bool) -> Probe:
    """Where the elements of ``source`` lie in ``value``.

    Args:
        alone: whether ``value`` must consist of ``source`` alone; else it may be a sum with other values.

    Raises:
        NotFollowedError: a node between them is not linear, or elements are added up or scaled differently.
    """
    nodes = cone(source, value)
    size = fake_tensor(source).numel()
    shape = [concrete(length) for length in fake_tensor(source).shape]
    numbers = torch.arange(1, concrete(size) + 1, dtype=torch.float64).reshape(shape)
    counted = _run(source, value, nodes, numbers, alone)
    factors = _run(source, value, nodes, torch.ones_like(numbers), alone)
    present = factors != 0
    if not present.any():
        raise NotFollowedError(f"{value.name} does not depend on {source.name}")
    factor = float(factors[present][0])
    index = torch.where(present, (counted / torch.where(present, factors, 1.0)).round(), 0.0).to(torch.int64) - 1
    same = torch.allclose(factors[present], torch.full_like(factors[present], factor))
    if not same or not torch.allclose(counted[present], (index[present] + 1).double() * factor):
        raise NotFollowedError(f"elements of {source.name} are added up or scaled differently in {value.name}")
    return Probe(index, factor)


def concrete(size: Any) -> int:
    """A size as a number: of a symbolic one the value that the capture saw.

    Raises:
        NotFollowedError: the size depends on data.
    """
    if isinstance(size, int):
        return size
    hint = size.node.hint
    if hint is None:
        raise NotFollowedError(f"the size {size} depends on data")
    return int(hint)


def view_sizes(value: Node) -> list[int | Node]:
    """The sizes of a value for a ``view``: numbers, -1 for a lone symbol, else the nodes of the symbols.

    Raises:
        NotFollowedError: no node before the value has one of its sizes.
    """
    sizes = list(fake_tensor(value).shape)
    if sum(not isinstance(size, int) for size in sizes) == 1:
        return [size if isinstance(size, int) else -1 for size in sizes]
    known = {number_key(fake_value(node)): node for node in reversed(_before(value)) if is_symbol(node)}
    missing = [size for size in sizes if not isinstance(size, int) and number_key(size) not in known]
    if missing:
        raise NotFollowedError(f"no value of the graph is the size {missing[0]} of {value.name}")
    return [size if isinstance(size, int) else known[number_key(size)] for size in sizes]


def _before(value: Node) -> list[Node]:
    return list(takewhile(lambda node: node is not value, value.graph.nodes))


def _reach(starts: list[Node], following: Callable[[Node], list[Node]]) -> set[Node]:
    seen = set(starts)
    pending = list(starts)
    while pending:
        for other in following(pending.pop()):
            if other not in seen:
                seen.add(other)
                pending.append(other)
    return seen


def _run(source: Node, value: Node, nodes: list[Node], filled: Tensor, alone: bool) -> Tensor:
    values: dict[Node, Any] = {source: filled}

    def operand_value(operand: Node) -> Any:
        if operand in values:
            return values[operand]
        known = fake_value(operand)
        if is_symbol(operand) or isinstance(known, (int, float)):
            return concrete(known)
        if alone or not is_tensor(operand):
            raise NotFollowedError(f"{operand.name} ({operator_name(operand)}) comes in between")
        return torch.zeros([concrete(size) for size in fake_tensor(operand).shape], dtype=torch.float64)

    for node in nodes:
        if not is_linear_step(node):
            raise NotFollowedError(f"{node.name} ({operator_name(node)}) is not linear, or not known to be")
        if _cuts_varying_dim(node):
            raise NotFollowedError(
                f"{node.name} ({operator_name(node)}) cuts a dim whose size varies from call to call"
            )
        args: Any = map_arg(node.args, operand_value)  # type: ignore[arg-type]  # any value may stand for a node
        kwargs: Any = map_arg(node.kwargs, operand_value)  # type: ignore[arg-type]  # the same
        values[node] = _apply(node, args, kwargs)
    result = values[value]
    assert isinstance(result, Tensor), f"{value.name}: only tensors are probed"
    return result


_CUTS = {
    "slice": 1,
    "select": 1,
    "narrow": 1,
    "slice_scatter": 2,
    "select_scatter": 2,
    "split": 2,
    "split_with_sizes": 2,
}
"""Position of the dim among the arguments of operators that cut at places."""


def _cuts_varying_dim(node: Node) -> bool:
    """Whether a node cuts a dim of symbolic size: where it does so was seen for one size only."""
    position = _CUTS.get(operator_name(node))
    operand = node.args[0] if node.args else None
    if position is None or not isinstance(operand, Node) or not is_tensor(operand):
        return False
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    is_whole = operator_name(node) == "slice" and node.args[2:3] in ((), (0,), (None,)) and len(node.args) < 5
    end = node.args[3] if len(node.args) > 3 else None
    if is_whole and (end is None or (isinstance(end, int) and end >= _END)):
        return False
    return isinstance(dim, int) and not isinstance(fake_tensor(operand).shape[dim], int)


_END = 2**62
"""A slice to the end of a dim has a larger one."""


def _apply(node: Node, args: Any, kwargs: Any) -> Any:
    if operator_name(node) in ("_to_copy", "to"):
        # Another dtype or device: the same elements.
        return args[0]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target), f"{node.name}: target of a call_function is callable"
    return node.target(*map(_symbols_to_numbers, args), **kwargs)


def _symbols_to_numbers(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return type(argument)(_symbols_to_numbers(member) for member in argument)
    return concrete(argument) if isinstance(argument, torch.SymInt) else argument
