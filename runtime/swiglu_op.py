"""silu(gate) * up as one operator with the LoRA on both sides of it: B h of gate and up, A m of down."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bdlora_compile.runtime.kernels.tiles import h_width, swiglu_planes
from bdlora_compile.runtime.linear_op import is_served_by_token
from bdlora_compile.runtime.ops import accumulate_dtype, has_kernels, lora_expand, lora_shrink


@torch.library.custom_op("bdlora::lora_swiglu", mutates_args=())
def lora_swiglu(
    y: Tensor,
    h: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    sites: Sequence[int],
    parts: int,
    down: Sequence[int],
    down_width: int,
) -> tuple[Tensor, Tensor]:
    """m = silu(gate) * up of y = (gate, up), and h = A m for the product behind.

    On GPUs the kernel may start before the one ahead of it in the stream has ended, which must not write ``pool``,
    ``slots``, ``scales`` or ``token_slot``.

    Args:
        y: [..., 2 F], of F columns each.
        h: float32 [planes, T, parts * 2, any width] of gate and up, whose LoRA y lacks for few tokens
            (`is_served_by_token`); of more it is not read. None: y lacks nothing.
        pool, slots, scales, token_slot, sites, parts: as for `ops.lora_expand`; of gate and up, each with its own
            columns alone.
        down: the row of ``slots`` of the product behind, whose A is [r, F/c]; none if nobody wants its h.
        down_width: its largest r.

    Returns:
        m: [..., F] like y; gate, up and silu(gate) are rounded to its dtype. h of down: float32 [`swiglu_planes`, T, 1,
        `h_width`], like that of `linear_op.lora_linear`; no planes if it is not wanted, and for more tokens than few it
        may hold anything.
    """
    is_few = is_served_by_token(y)
    if h is not None and is_few:
        halves = (y.shape[-1] // 2, y.shape[-1] // 2)
        y = lora_expand(y, h.sum(0).flatten(1), pool, slots, scales, token_slot, sites, halves, parts)
    gate, up = y.chunk(2, dim=-1)
    m = (torch.nn.functional.silu(gate) * up).contiguous()
    made = _room_for_h(m, down, down_width)
    if down and is_few:
        made[0, :, 0] = lora_shrink(m, pool, slots, token_slot, down, made.shape[-1])
        made[1:] = 0
    return m, made


@lora_swiglu.register_fake
def _(y: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    *_, down, down_width = others
    m = y.new_empty(*y.shape[:-1], y.shape[-1] // 2)
    return m, _room_for_h(m, down, down_width)  # type: ignore[arg-type]  # the last two


@lora_swiglu.register_kernel("cuda")
def _(
    y: Tensor,
    h: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    sites: Sequence[int],
    parts: int,
    down: Sequence[int],
    down_width: int,
) -> tuple[Tensor, Tensor]:
    features = y.shape[-1] // 2
    if not has_kernels(y.dtype) or features % 8:
        return lora_swiglu._init_fn(y, h, pool, slots, scales, token_slot, sites, parts, down, down_width)
    from bdlora_compile.runtime.kernels import launch, launch_swiglu  # Triton is there on GPUs only

    is_few = is_served_by_token(y)
    rows = y.reshape(-1, y.shape[-1]).contiguous()
    m = rows.new_empty(rows.shape[0], features)
    made = _room_for_h(m, down, down_width)
    behind = launch_swiglu.Behind(launch.Factors(pool, slots, token_slot, down), made) if down and is_few else None
    gate_and_up = launch.Factors(pool, slots, token_slot, sites)
    missing = h.contiguous() if h is not None and is_few else None
    launch_swiglu.swiglu(rows, m, gate_and_up, scales, missing, behind, parts)
    return m.view(*y.shape[:-1], features), made


def _room_for_h(m: Tensor, down: Sequence[int], down_width: int) -> Tensor:
    """For h of down, which reads ``m``."""
    tokens, features = math.prod(m.shape[:-1]), m.shape[-1]
    planes = swiglu_planes(features) if down else 0
    return m.new_empty(planes, tokens, 1, h_width(down_width), dtype=accumulate_dtype(m.dtype))
