"""Writing to the cache as a graph operator: certainly in place, where a compiler would copy a layer for a token.

Legend: B rows, G kv heads on this rank, S new tokens of a row, L tokens that a row has room for, d size of a head.
"""

import torch
from torch import Tensor


@torch.library.custom_op("bdlora::cache_write_", mutates_args=("keys", "values"))
def cache_write_(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    """``keys[row, :, lengths[row] + i] = k[row, :, i]`` for all rows and new tokens i, and the same for values.

    Args:
        keys, values: [B, G, L, d], one layer of the cache.
        k, v: [B, G, S, d] in any layout.
        lengths: int64 [B], tokens that each row holds already; with S at most L, which `LocalCache` checks on the host.
    """
    row = torch.arange(k.shape[0], device=k.device)[:, None]
    position = lengths[:, None] + torch.arange(k.shape[2], device=k.device)
    for cache, new in ((keys, k), (values, v)):
        cache.transpose(1, 2).index_put_((row, position), new.transpose(1, 2))


@cache_write_.register_fake
def _(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    return None


@cache_write_.register_kernel("cuda")
def _(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    from bdlora_compile.runtime.kernels.cache import write_tokens_  # Triton need not be installed elsewhere

    write_tokens_(keys, values, k, v, lengths)
