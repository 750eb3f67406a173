"""Launching the kernel of `rotary.py`."""

from typing import NamedTuple

import triton
from torch import Tensor

from bdlora_compile.runtime.kernels.launch import Factors, pdl
from bdlora_compile.runtime.kernels.rotary import rotate_tokens
from bdlora_compile.runtime.kernels.tiles import can_overlap, rotary_heads

_ROWS = 4
"""Rows of B that a program holds at once, at most: 32 elements a thread."""
_PAIRS_OF_A_WARP = 128
"""Columns of a first half and as many of a second: 8 bytes of each for a thread."""


class Missing(NamedTuple):
    """LoRA of q, k and v that y lacks.

    Attributes:
        factors: where those of the three sites lie.
        scales: float32 [sites, S].
        h: float32 [planes, T, parts * 3, any width], which sum to A x.
        parts: ranks whose shares of h lie side by side.
    """

    factors: Factors
    scales: Tensor
    h: Tensor
    parts: int


def rotate(
    y: Tensor,
    angles: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    lengths: Tensor,
    heads: int,
    missing: Missing | None,
) -> Tensor:
    """Rotate q and k, write k and v to the cache.

    Args:
        y: [B, S, (H + 2 G) d], contiguous; not changed.
        angles: cos and sin, contiguous [1 or B, S, d].
        cache: keys and values, [B, G, L, d], a token's values together; of equal strides.
        lengths: int64 [B].
        heads: H.
        missing: None if y has all LoRA.

    Returns:
        q, [B, H, S, d] in memory [B, S, H, d].
    """
    (batch, seq, _), (cos, sin), (keys, values) = y.shape, angles, cache
    groups, room, dim = keys.shape[1:]
    assert keys.stride() == values.stride(), "keys and values are parts of one tensor"
    assert keys.stride(3) == 1, "a token's values lie together"
    assert y.is_contiguous(), "a token's columns follow those of the one before"
    assert lengths.is_contiguous(), "a row's number follows that of the one before"
    q = y.new_empty(batch, seq, heads, dim)
    if batch * seq == 0:
        return q.transpose(1, 2)
    half, overlap = triton.next_power_of_2(dim // 2), can_overlap()
    block = rotary_heads(heads, groups, dim)
    tiles = triton.cdiv(heads, block) + 2 * triton.cdiv(groups, block)
    lora: tuple[Tensor | None, ...] = (None,) * 5
    sizes: tuple[int, ...] = (0,) * 5
    planes, parts = 1, 1
    if missing is not None:
        factors, scales, h, parts = missing
        lora = (h, factors.pool, factors.slots, scales, factors.token_slot)
        sizes, planes = (factors.num_slots, h.shape[-1], *factors.sites), h.shape[0]
    rotate_tokens[(batch * seq, tiles)](
        y, cos, sin, keys, values, lengths, q, *lora,
        seq, room, seq if cos.shape[0] > 1 else 0, *keys.stride()[:3], batch * seq, *sizes,
        HEADS=heads, KV_HEADS=groups, DIM=dim, BLOCK_H=block, HALF=half, ROWS=_ROWS, PLANES=planes, PARTS=parts,
        EXPAND=missing is not None, OVERLAP=overlap, num_warps=max(1, block * half // _PAIRS_OF_A_WARP),
        **pdl(overlap),
    )  # fmt: skip
    return q.transpose(1, 2)
