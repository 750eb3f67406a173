"""A base product and its LoRA as one operator: by one kernel where a plan says so, two operators elsewhere."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bdlora_compile.runtime.kernels.tiles import (
    BY_TOKEN_LIMIT,
    Call,
    Product,
    can_overlap,
    launches_for,
    product_for,
    product_with_h,
)
from bdlora_compile.runtime.ops import has_kernels, lora_apply_

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
    """`lora_linear`, but of few tokens (`is_served_by_token`) LoRA is left to `norm_op.all_reduce_add_norm_lora`."""
    if is_served_by_token(x):
        return torch.nn.functional.linear(x, weight)
    return _in_two(x, weight, (pool, slots, scales, token_slot), order, segments, sites, width, out_features)


@lora_linear_deferred.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


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
