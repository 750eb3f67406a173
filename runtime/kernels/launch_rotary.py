"""Launching the kernel of `rotary.py`."""

import triton
from torch import Tensor

from bdlora_compile.runtime.kernels.launch import pdl
from bdlora_compile.runtime.kernels.rotary import rotate_tokens
from bdlora_compile.runtime.kernels.tiles import can_overlap, rotary_heads

_PAIRS_OF_A_WARP = 128
"""Columns of a first half and as many of a second: 8 bytes of each for a thread."""


def rotate(
    y: Tensor,
    angles: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    lengths: Tensor,
    heads: int,
    delta: Tensor | None,
) -> Tensor:
    """Rotate q and k, write k and v to the cache.

    Args:
        y: [B, S, (H + 2 G) d], contiguous; not changed.
        angles: cos and sin, contiguous [1 or B, S, d].
        cache: keys and values, [B, G, L, d], a token's values together; of equal strides.
        lengths: int64 [B].
        heads: H.
        delta: what y lacks, [at least B S, (H + 2 G) d], contiguous.

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
    rotate_tokens[(batch * seq, tiles)](
        y, cos, sin, keys, values, lengths, q, delta, seq, room, seq if cos.shape[0] > 1 else 0, *keys.stride()[:3],
        HEADS=heads, KV_HEADS=groups, DIM=dim, BLOCK_H=block, HALF=half, HAS_DELTA=delta is not None, OVERLAP=overlap,
        num_warps=max(1, block * half // _PAIRS_OF_A_WARP), **pdl(overlap),
    )  # fmt: skip
    return q.transpose(1, 2)
