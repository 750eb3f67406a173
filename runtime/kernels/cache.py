"""New keys and values into the cache: one launch for both, a program for each new token of each row."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _copy_heads(cache, new, position, token, inside, h, d, c_h, c_l, n_h, n_s):
    x = tl.load(new + h * n_h + token * n_s + d, mask=inside)
    tl.store(cache + h * c_h + position * c_l + d, x, mask=inside)


@triton.jit(do_not_specialize=["seq", "room"])
def write_tokens(
    keys, values, k, v, lengths, seq, room,
    c_b, c_h, c_l, k_b, k_h, k_s, v_b, v_h, v_s,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Strides in elements by row, head and token: of the cache (c), k and v; a token's values lie together."""
    row = (tl.program_id(0) // seq).to(tl.int64)
    token = (tl.program_id(0) % seq).to(tl.int64)
    position = tl.load(lengths + row).to(tl.int64) + token
    h = tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    # A token without room would be another row's: it is left out.
    inside = (h < HEADS) & (d < DIM) & (position >= 0) & (position < room)
    _copy_heads(keys + row * c_b, k + row * k_b, position, token, inside, h, d, c_h, c_l, k_h, k_s)
    _copy_heads(values + row * c_b, v + row * v_b, position, token, inside, h, d, c_h, c_l, v_h, v_s)


def write_tokens_(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    """`cache_ops.cache_write_` by the kernel."""
    batch, heads, seq, head_dim = k.shape
    k, v = (new if new.stride(3) == 1 else new.contiguous() for new in (k, v))
    assert keys.stride() == values.stride(), "keys and values are parts of one tensor"
    assert keys.stride(3) == 1, "a token's values lie together"
    if batch * seq == 0:
        return
    write_tokens[(batch * seq,)](
        keys, values, k, v, lengths, seq, keys.shape[2],
        *keys.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        HEADS=heads, DIM=head_dim,
        BLOCK_H=triton.next_power_of_2(heads), BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=4,
    )  # fmt: skip
