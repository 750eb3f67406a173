"""A base product and its LoRA as one operator: by one kernel where a plan says so, two operators elsewhere."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bdlora_compile.runtime.beside import product_beside
from bdlora_compile.runtime.kernels.tiles import (
    BY_TOKEN_LIMIT,
    Call,
    Product,
    can_overlap,
    h_width,
    launches_for,
    planes_ahead,
    product_for,
    product_with_h,
)
from bdlora_compile.runtime.ops import accumulate_dtype, has_kernels, lora_apply_, lora_shrink

NUM_COUNTERS = 1024
"""Counters of a forward: two, and one for each tile of a product's columns."""


@torch.library.custom_op("bdlora::lora_counters", mutates_args=())
def lora_counters(token_slot: Tensor) -> Tensor:
    """int32 [NUM_COUNTERS], zero: what the programs of one launch count each other by.

    Made once a forward; every `lora_linear` leaves them zero.
    """
    return token_slot.new_zeros(NUM_COUNTERS)


@lora_counters.register_fake
def _(token_slot: Tensor) -> Tensor:
    return token_slot.new_empty(NUM_COUNTERS)


@torch.library.custom_op("bdlora::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor,
    weight: Tensor,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    order: Tensor,
    segments: Tensor,
    counters: Tensor,
    sites: Sequence[int],
    width: int,
    out_features: Sequence[int],
    h: Tensor | None = None,
) -> Tensor:
    """y = x W^T + scale * (B (A x)), each token with the factors and the scale of its slot.

    Args:
        x: [..., D]. weight: W [O, D], O the sum of ``out_features``.
        counters: from `lora_counters`. Calls that share them must not run at the same time.
        pool, slots, scales, token_slot, order, segments, sites, width, out_features: as for `ops.lora_apply_`; the
            kernel ahead in the stream may write x, but neither W nor these.
        h: what the kernel that writes x made of it: float32 [planes, T, n, `h_width`], which sum to A x, for up to
            `BY_TOKEN_LIMIT` tokens; of more it is not read.

    Returns:
        [..., O] like x. By one kernel the sum is rounded once; by two operators the base product is rounded before LoRA
        is added.
    """
    bank = (pool, slots, scales, token_slot)
    return _in_two(x, weight, bank, order, segments, sites, width, out_features)


@lora_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@lora_linear.register_kernel("cuda")
def _(
    x: Tensor,
    weight: Tensor,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    order: Tensor,
    segments: Tensor,
    counters: Tensor,
    sites: Sequence[int],
    width: int,
    out_features: Sequence[int],
    h: Tensor | None = None,
) -> Tensor:
    h = h if is_served_by_token(x) else None
    call = Call(math.prod(x.shape[:-1]), x.shape[-1], tuple(out_features), width)
    plan = _product_of(call, x, weight, is_h_given=h is not None)
    if plan is None and h is None:
        return _in_two(x, weight, (pool, slots, scales, token_slot), order, segments, sites, width, out_features)
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    rows, factors = x.reshape(-1, x.shape[-1]), launch.Factors(pool, slots, token_slot, sites)
    if plan is not None:
        y = launch.linear(rows, weight, factors, scales, counters, width, out_features, plan, h)
    else:
        assert h is not None, "asked before"
        y = torch.nn.functional.linear(rows, weight)
        tiles = launches_for(call).expand
        launch.expand(y, h, factors, scales, None, out_features, 1, tiles, overlap=can_overlap(), behind_y=True)
    return y.view(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("bdlora::lora_linear_ahead", mutates_args=())
def lora_linear_ahead(
    x: Tensor,
    weight: Tensor,
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
    """`lora_linear`, but of few tokens (`is_served_by_token`) the second half of LoRA is left to who reads y.

    Returns:
        y: [..., O] like x. h: float32 [planes, T, n, `h_width`], which sum to A x; of more tokens than few it may hold
        anything, and y lacks nothing.
    """
    y = lora_linear_deferred(x, weight, pool, slots, scales, token_slot, order, segments, sites, width, out_features)
    h = _room_for_h(x, len(sites), width).zero_()
    if is_served_by_token(x):
        h[0] = lora_shrink(x, pool, slots, token_slot, sites, h.shape[-1]).unflatten(1, (len(sites), -1))
    return y, h


@lora_linear_ahead.register_fake
def _(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, sites, width, _out_features = others
    return x.new_empty(*x.shape[:-1], weight.shape[0]), _room_for_h(x, len(sites), width)


@lora_linear_ahead.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    pool, slots, _, token_slot, _, _, sites, width, _ = others
    if not is_served_by_token(x):
        y: Tensor = lora_linear_deferred._init_fn(x, weight, *others)
        return y, _room_for_h(x, len(sites), width)
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    rows, factors = x.reshape(-1, x.shape[-1]), launch.Factors(pool, slots, token_slot, sites)
    return product_beside(x, weight, lambda: launch.make_h_ahead(rows, factors, width))


def _room_for_h(x: Tensor, num_sites: int, width: int) -> Tensor:
    planes, tokens = planes_ahead(x.shape[-1], width), math.prod(x.shape[:-1])
    return x.new_empty(planes, tokens, num_sites, h_width(width), dtype=accumulate_dtype(x.dtype))


@torch.library.custom_op("bdlora::lora_linear_deferred", mutates_args=())
def lora_linear_deferred(
    x: Tensor,
    weight: Tensor,
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
    """`lora_linear`, but of few tokens (`is_served_by_token`) all of LoRA is left to who reads y."""
    if is_served_by_token(x):
        return torch.nn.functional.linear(x, weight)
    return _in_two(x, weight, (pool, slots, scales, token_slot), order, segments, sites, width, out_features)


@lora_linear_deferred.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("bdlora::lora_nothing", mutates_args=())
def lora_nothing(x: Tensor, planes: int, parts: int, width: int) -> Tensor:
    """An h that nobody reads, for a table in which no slot has an adapter: float32 [planes, T, parts, width]."""
    return _nothing(x, planes, parts, width)


@lora_nothing.register_fake
def _nothing(x: Tensor, planes: int, parts: int, width: int) -> Tensor:
    return x.new_empty(planes, math.prod(x.shape[:-1]), parts, width, dtype=accumulate_dtype(x.dtype))


def _in_two(
    x: Tensor,
    weight: Tensor,
    bank: tuple[Tensor, Tensor, Tensor, Tensor],
    order: Tensor,
    segments: Tensor,
    sites: Sequence[int],
    width: int,
    out_features: Sequence[int],
) -> Tensor:
    """The product, then LoRA added to it; ``bank`` is pool, slots, scales and token_slot."""
    y = torch.nn.functional.linear(x, weight)
    lora_apply_(x, y, *bank, order, segments, sites, width, out_features)
    return y


def is_served_by_token(x: Tensor) -> bool:
    """Whether kernels work token by token for what has the shape and dtype of x, and read h that was made for them."""
    return has_kernels(x.dtype) and math.prod(x.shape[:-1]) <= BY_TOKEN_LIMIT


def _product_of(call: Call, x: Tensor, weight: Tensor, *, is_h_given: bool) -> Product | None:
    """The plan of a product with LoRA inside; None where the product and LoRA are two operators."""
    if not has_kernels(x.dtype) or not weight.is_contiguous():
        return None
    plan = product_with_h(call) if is_h_given else product_for(call)
    covers = plan is not None and weight.shape[0] == sum(call.out_features)
    return plan if plan and covers and weight.shape[0] // plan.columns + 2 <= NUM_COUNTERS else None
