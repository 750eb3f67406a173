"""The first half of an MLP as one operator: the product of gate and up with its LoRA, silu(gate) * up, h of down."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bdlora_compile.runtime.kernels.tiles import (
    Call,
    adds_at_activation,
    can_overlap,
    h_width,
    launches_for,
    swiglu_planes,
)
from bdlora_compile.runtime.linear_op import is_served_by_token, lora_linear
from bdlora_compile.runtime.ops import accumulate_dtype, has_kernels, lora_shrink

if TYPE_CHECKING:
    from bdlora_compile.runtime.kernels.launch import Factors


@torch.library.custom_op("bdlora::lora_linear_swiglu", mutates_args=())
def lora_linear_swiglu(
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
    down: int,
    down_width: int,
) -> tuple[Tensor, Tensor]:
    """m = silu(gate) * up of (gate, up) = `linear_op.lora_linear`, and h = A m for the product behind.

    Args:
        x, weight, pool, ..., out_features: as for `lora_linear`; two sites, of F columns each.
        down, down_width: the row of ``slots`` of the product behind, whose A is [r, F/c], and its largest r.

    Returns:
        m: [..., F] like x; gate, up and silu(gate) are rounded to its dtype. h of down: [`swiglu_planes`, T, 1,
        `h_width`], like that of `lora_linear`: for more than `BY_TOKEN_LIMIT` tokens it may hold anything.
    """
    bank = (pool, slots, scales, token_slot, order, segments, counters)
    gate, up = lora_linear(x, weight, *bank, sites, width, out_features).chunk(2, dim=-1)
    m = torch.nn.functional.silu(gate) * up
    made = _room_for_h(m, down_width).zero_()
    made[0, :, 0, :down_width] = lora_shrink(m, pool, slots, token_slot, [down], down_width)
    return m, made


@lora_linear_swiglu.register_fake
def _(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    m = x.new_empty(*x.shape[:-1], weight.shape[0] // 2)
    return m, _room_for_h(m, down_width=others[-1])


@lora_linear_swiglu.register_kernel("cuda")
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
    down: int,
    down_width: int,
) -> tuple[Tensor, Tensor]:
    features = weight.shape[0] // 2
    bank = (pool, slots, scales, token_slot, order, segments, counters)
    if not has_kernels(x.dtype) or features % 8:
        return lora_linear_swiglu._init_fn(x, weight, *bank, sites, width, out_features, down, down_width)
    from bdlora_compile.runtime.kernels import launch, launch_swiglu  # Triton is there on GPUs only

    is_by_token = is_served_by_token(x)
    gate_and_up = launch.Factors(pool, slots, token_slot, sites)
    rows, pending = x.reshape(-1, x.shape[-1]), None
    call = Call(rows.shape[0], rows.shape[1], tuple(out_features), width)
    if is_by_token and adds_at_activation(call):
        pending = _h_of(rows, gate_and_up, call)
        y = torch.nn.functional.linear(rows, weight)
    else:
        y = lora_linear(rows, weight, *bank, sites, width, out_features)
    m = rows.new_empty(rows.shape[0], features)
    made = _room_for_h(m, down_width)
    behind = launch_swiglu.Behind(launch.Factors(pool, slots, token_slot, [down]), made) if is_by_token else None
    launch_swiglu.swiglu(y, m, gate_and_up, scales, pending, behind)
    return m.view(*x.shape[:-1], features), made


def _h_of(x: Tensor, factors: "Factors", call: Call) -> Tensor:
    """h of few tokens by a launch of its own, which starts while the kernel that writes x ends."""
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    tiles, overlap = launches_for(call).shrink, can_overlap()
    return launch.shrink(x, factors, None, h_width(call.width), tiles, overlap=overlap, early=overlap)


def _room_for_h(m: Tensor, down_width: int) -> Tensor:
    """For h of down, which reads ``m``."""
    tokens, features = math.prod(m.shape[:-1]), m.shape[-1]
    return m.new_empty(swiglu_planes(features), tokens, 1, h_width(down_width), dtype=accumulate_dtype(m.dtype))
