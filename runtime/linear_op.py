"""A base product and its LoRA as one operator: side by side on two streams of a GPU for few tokens, else in turn."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bdlora_compile.runtime.beside import product_beside
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.runtime.ops import has_kernels, lora_apply, lora_apply_

if TYPE_CHECKING:
    from bdlora_compile.runtime.kernels import launch


class Lora(NamedTuple):
    """What the operators here take behind W and its bias, in the order of `ops.lora_apply_`; see there."""

    pool: Tensor
    slots: Tensor
    scales: Tensor
    token_slot: Tensor
    order: Tensor
    segments: Tensor
    sites: Sequence[int]
    width: int
    out_features: Sequence[int]


@torch.library.custom_op("bdlora::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    order: Tensor,
    segments: Tensor,
    sites: Sequence[int],
    width: int,
    out_features: Sequence[int],
) -> Tensor:
    """y = x W^T + bias + scale * (B (A x)), each token with the factors and the scale of its slot.

    Args:
        x: [..., D]. weight: W [O, D], O the sum of ``out_features``. bias: [O].
        pool, slots, scales, token_slot, order, segments, sites, width, out_features: as for `ops.lora_apply_`; the
            kernel ahead in the stream may write x, but neither W nor these.

    Returns:
        [..., O] like x; the base product is rounded before LoRA is added.
    """
    lora = Lora(pool, slots, scales, token_slot, order, segments, sites, width, out_features)
    return _in_two(x, weight, bias, lora)


@lora_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@lora_linear.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
    lora = Lora(*others)
    writes_all = len(lora.sites) == 1 or sum(lora.out_features) == weight.shape[0]
    if has_delta(x) and writes_all:
        return with_delta(*_beside(x, weight, bias, lora))
    return _in_two(x, weight, bias, lora)


@torch.library.custom_op("bdlora::lora_linear_beside", mutates_args=())
def lora_linear_beside(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    order: Tensor,
    segments: Tensor,
    sites: Sequence[int],
    width: int,
    out_features: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """`lora_linear`, but of few tokens (`has_delta`) LoRA is a second result, made beside the product.

    Args:
        x, weight, bias, pool, slots, scales, token_slot, order, segments, sites, width, out_features: as for
            `lora_linear`; one site may write fewer columns than W has rows.

    Returns:
        y: [..., O] like x. delta: [`BY_TOKEN_LIMIT`, O] like x, what y lacks in its first T rows; the other rows hold
            anything, and so do all where tokens are more than few.
    """
    lora = Lora(pool, slots, scales, token_slot, order, segments, sites, width, out_features)
    if not has_delta(x):
        return _in_two(x, weight, bias, lora), room_for_delta(x, weight)
    y = torch.nn.functional.linear(x, weight, bias)
    added = lora_apply(x, torch.zeros_like(y), pool, slots, scales, token_slot, sites, width, out_features)
    return y, as_delta(added)


@lora_linear_beside.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), room_for_delta(x, weight)


@lora_linear_beside.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    lora = Lora(*others)
    if not has_delta(x):
        return _in_two(x, weight, bias, lora), room_for_delta(x, weight)
    return _beside(x, weight, bias, lora)


def _beside(x: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora) -> tuple[Tensor, Tensor]:
    """(y, delta) on a GPU, for few tokens."""
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    rows, factors = launch.rows_of(x), launch.Factors.of(lora.pool, lora.slots, lora.token_slot, lora.sites)
    work = launch.work_beside(rows.shape[0], lora.order, lora.segments)
    path = launch.Beside(factors, lora.scales, lora.out_features, work=work)
    return product_and_lora(x, weight, bias, path, lambda: launch.make_h_beside(rows, factors, work, lora.width))


def product_and_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, path: "launch.Beside", make_h: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """(y, delta) of `lora_linear_beside` on a GPU, for few tokens.

    ``make_h`` launches what makes h, [planes, T, parts * n, width], beside the product, as is what makes delta of it.
    """
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    return product_beside(x, weight, bias, lambda: launch.delta(make_h(), path, weight.shape[0], x.dtype))


def has_delta(x: Tensor) -> bool:
    """Whether what has the shape and dtype of x has its LoRA beside the product: who reads the product adds it."""
    return has_kernels(x.dtype) and math.prod(x.shape[:-1]) <= BY_TOKEN_LIMIT


def room_for_delta(x: Tensor, weight: Tensor) -> Tensor:
    """For what a product x W^T of few tokens lacks, [`BY_TOKEN_LIMIT`, O] like x."""
    return x.new_empty(BY_TOKEN_LIMIT, weight.shape[0])


def as_delta(added: Tensor) -> Tensor:
    """What is added to few tokens, [..., O], in the rows of a delta."""
    rows = added.reshape(-1, added.shape[-1])
    return torch.nn.functional.pad(rows, (0, 0, 0, BY_TOKEN_LIMIT - rows.shape[0]))


def missing_from(y: Tensor, delta: Tensor | None) -> Tensor | None:
    """What y lacks, contiguous: of few tokens (`has_delta`) the first rows of delta, of more nothing."""
    return delta.contiguous() if delta is not None and has_delta(y) else None


def with_delta(y: Tensor, delta: Tensor | None) -> Tensor:
    """y and what it lacks."""
    missing = missing_from(y, delta)
    return y if missing is None else y + missing[: math.prod(y.shape[:-1])].view_as(y)


@torch.library.custom_op("bdlora::lora_no_delta", mutates_args=())
def lora_no_delta(x: Tensor) -> Tensor:
    """The delta of an x [..., O] that lacks nothing: zeros, [`BY_TOKEN_LIMIT`, O] like x."""
    return x.new_zeros(BY_TOKEN_LIMIT, x.shape[-1])


@lora_no_delta.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(BY_TOKEN_LIMIT, x.shape[-1])


def _in_two(x: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora) -> Tensor:
    """The product, then LoRA added to it."""
    y = torch.nn.functional.linear(x, weight, bias)
    lora_apply_(x, y, *lora)
    return y
