"""What lies between the product of q, k and v and attention as one operator: rotations and the write to the cache.

Legend: B rows, S new tokens of a row, T = B S, H/G query/kv heads on this rank, L tokens that a row has room for, d
size of a head.
"""

import torch
from torch import Tensor

from bdlora_compile.runtime.cache_ops import cache_write_
from bdlora_compile.runtime.linear_op import missing_from, with_delta
from bdlora_compile.runtime.ops import has_kernels


@torch.library.custom_op("bdlora::rotate_and_cache", mutates_args=("keys", "values"))
def rotate_and_cache(
    y: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    heads: int,
    kv_heads: int,
    delta: Tensor | None = None,
) -> Tensor:
    """Rotate q and k of y = (q, k, v), and write k and v to the cache as `cache_ops.cache_write_` does.

    Args:
        y: [B, S, (H + 2 G) d].
        cos, sin: [1 or B, S, d], like y: a head x becomes x * cos + (-its second half, its first half) * sin, where
            both products and the sum are rounded to the dtype.
        keys, values: [B, G, L, d], one layer of the cache.
        lengths: int64 [B], tokens that each row holds already.
        heads, kv_heads: H and G.
        delta: what y lacks, from `linear_op.lora_linear_beside`.

    Returns:
        q rotated, [B, H, S, d] in memory [B, S, H, d], as attention reads it.
    """
    batch, seq, _ = y.shape
    dim = keys.shape[3]
    sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
    parts = with_delta(y, delta).split(sizes, dim=-1)
    q, k, v = (part.reshape(batch, seq, part.shape[-1] // dim, dim).transpose(1, 2) for part in parts)
    cache_write_(keys, values, _rotated(k, cos, sin), v, lengths)
    # Where dims have one element an operator's strides are as they come, and the compiler is told of others.
    return _room_for_q(y, keys, heads).copy_(_rotated(q, cos, sin))


@rotate_and_cache.register_fake
def _(
    y: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, heads: int, *_: object
) -> Tensor:
    return _room_for_q(y, keys, heads)


@rotate_and_cache.register_kernel("cuda")
def _(
    y: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    heads: int,
    kv_heads: int,
    delta: Tensor | None = None,
) -> Tensor:
    if not _is_served(y, keys):
        return rotate_and_cache._init_fn(y, cos, sin, keys, values, lengths, heads, kv_heads, delta)
    from bdlora_compile.runtime.kernels import launch_rotary  # Triton is there on GPUs only

    angles, missing = (cos.contiguous(), sin.contiguous()), missing_from(y, delta)
    return launch_rotary.rotate(y.contiguous(), angles, (keys, values), lengths, heads, missing)


def _is_served(y: Tensor, keys: Tensor) -> bool:
    """Whether the kernel is for such a cache: a head has two halves."""
    return has_kernels(y.dtype) and keys.dtype == y.dtype and keys.shape[3] % 2 == 0


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [B, n, S, d], as transformers' layers have it."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def _room_for_q(y: Tensor, keys: Tensor, heads: int) -> Tensor:
    """[B, H, S, d] in memory [B, S, H, d]."""
    return y.new_empty(*y.shape[:2], heads, keys.shape[3]).transpose(1, 2)
