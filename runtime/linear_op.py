"""A base product and its LoRA as one operator: side by side on two streams of a GPU for few tokens, else in turn."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bdlora_compile.runtime.beside import product_beside
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.runtime.ops import has_kernels, lora_apply, lora_apply_

if TYPE_CHECKING:
    from bdlora_compile.runtime.kernels import launch


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
    bank = (pool, slots, scales, token_slot)
    return _in_two(x, weight, bias, bank, order, segments, sites, width, out_features)


@lora_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@lora_linear.register_kernel("cuda")
def _(
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
    bank = (pool, slots, scales, token_slot)
    writes_all = len(sites) == 1 or sum(out_features) == weight.shape[0]
    if not (has_delta(x) and writes_all):
        return _in_two(x, weight, bias, bank, order, segments, sites, width, out_features)
    y, delta = _beside(x, weight, bias, bank, sites, width, out_features)
    return y.add_(delta[: math.prod(y.shape[:-1])].view_as(y))


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
    bank = (pool, slots, scales, token_slot)
    if not has_delta(x):
        return _in_two(x, weight, bias, bank, order, segments, sites, width, out_features), room_for_delta(x, weight)
    y = torch.nn.functional.linear(x, weight, bias)
    added = lora_apply(x, torch.zeros_like(y), *bank, sites, width, out_features)
    return y, as_delta(added)


@lora_linear_beside.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), room_for_delta(x, weight)


@lora_linear_beside.register_kernel("cuda")
def _(
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
    bank = (pool, slots, scales, token_slot)
    if not has_delta(x):
        return _in_two(x, weight, bias, bank, order, segments, sites, width, out_features), room_for_delta(x, weight)
    return _beside(x, weight, bias, bank, sites, width, out_features)


def _beside(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: tuple[Tensor, Tensor, Tensor, Tensor],
    sites: Sequence[int],
    width: int,
    out_features: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """(y, delta) on a GPU, for few tokens; ``bank`` as for `_in_two`."""
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    pool, slots, scales, token_slot = bank
    rows, factors = x.reshape(-1, x.shape[-1]), launch.Factors(pool, slots, token_slot, sites)
    path = launch.Beside(factors, scales, out_features, 1)
    return product_and_lora(x, weight, bias, path, lambda: launch.make_h_beside(rows, factors, width))


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


def _in_two(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: tuple[Tensor, Tensor, Tensor, Tensor],
    order: Tensor,
    segments: Tensor,
    sites: Sequence[int],
    width: int,
    out_features: Sequence[int],
) -> Tensor:
    """The product, then LoRA added to it; ``bank`` is pool, slots, scales and token_slot."""
    y = torch.nn.functional.linear(x, weight, bias)
    lora_apply_(x, y, *bank, order, segments, sites, width, out_features)
    return y
