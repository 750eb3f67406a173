"""RMSNorms of a graph, as transformers' layers have them."""

from dataclasses import dataclass

import torch
from torch.fx import Node

from bdlora_compile.ir import fake_value, is_tensor, operator_name


@dataclass(frozen=True, slots=True)
class Norm:
    """weight * (s / sqrt(mean(s^2) + epsilon)), the quotient computed in float32 and rounded to the dtype of s.

    Attributes:
        weight: a placeholder, [D].
        epsilon: a number.
        result: the product.
    """

    weight: Node
    epsilon: float
    result: Node


def norm_of(value: Node) -> Norm | str:
    """The norm over the last dim of ``value`` among what reads it, or why there is none.

    exact = to(value, float32);  root = rsqrt(add(mean(pow(exact, 2), -1, keepdim=True), epsilon))
    result = mul(weight, to(mul(exact, root), dtype of value))
    """
    found = [norm for user in value.users if not isinstance(norm := _norm_from(user, value), str)]
    if len(found) == 1:
        return found[0]
    if found:
        return "more than one RMSNorm reads the sum"
    reasons = [
        norm
        for user in value.users
        if _is_cast(user, torch.float32) and isinstance(norm := _norm_from(user, value), str)
    ]
    return reasons[0] if reasons else "no RMSNorm reads the sum"


def _norm_from(exact: Node, value: Node) -> Norm | str:
    if not _is_cast(exact, torch.float32):
        return "it is not computed in float32"
    square, mean = _reader(exact, "pow"), None
    if square is not None and square.args[1:] == (2,) and not square.kwargs:
        mean = _reader(square, "mean", alone=True)
    if mean is None or mean.args[1:] != (-1,) or mean.kwargs != {"keepdim": True}:
        return "what reads the sum in float32 is no mean of squares"
    moved = _reader(mean, "add", alone=True)
    epsilon = moved.args[1] if moved is not None and len(moved.args) == 2 and not moved.kwargs else None
    root = _reader(moved, "rsqrt", alone=True) if moved is not None else None
    if root is None or not isinstance(epsilon, float):
        return "its mean of squares has no number added to it, or is no root"
    quotient = _reader(root, "mul", alone=True)
    if quotient is None or {*quotient.args} != {exact, root} or len(exact.users) != 2:
        return "the sum in float32 is read otherwise than by its norm"
    rounded = next(iter(quotient.users))
    if len(quotient.users) != 1 or not _is_cast(rounded, _dtype(value)):
        return f"its norm is not rounded to {_dtype(value)} before the weight"
    return _weighted(rounded, value, epsilon)


def _weighted(rounded: Node, value: Node, epsilon: float) -> Norm | str:
    result = _reader(rounded, "mul", alone=True)
    weight = next((operand for operand in result.args if operand is not rounded), None) if result is not None else None
    if result is None or not isinstance(weight, Node) or weight.op != "placeholder":
        return "its norm is not multiplied by a weight"
    own, other = fake_value(value), fake_value(weight)
    assert isinstance(own, torch.Tensor), "asked by `is_tensor`"
    if not isinstance(other, torch.Tensor) or other.shape != own.shape[-1:] or other.dtype != own.dtype:
        return "the weight of its norm has another shape or dtype"
    return Norm(weight, epsilon, result)


def _reader(node: Node, name: str, *, alone: bool = False) -> Node | None:
    """The one reader of a node that is called ``name``; ``alone``: there may be no others."""
    readers = [user for user in node.users if operator_name(user) == name]
    return readers[0] if len(readers) == 1 and (not alone or len(node.users) == 1) else None


def _is_cast(node: Node, dtype: torch.dtype | None) -> bool:
    """Whether the node is its one operand in ``dtype``, also where that is the operand's own."""
    return (
        operator_name(node) in ("to", "float")
        and is_tensor(node)
        and _dtype(node) == dtype
        and len(node.all_input_nodes) == 1
    )


def _dtype(node: Node) -> torch.dtype | None:
    value = fake_value(node)
    return value.dtype if isinstance(value, torch.Tensor) else None
