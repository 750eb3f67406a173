"""Attention over rows of different length: each row of a batch sees its own keys, and nothing before or after them.

Legend: B rows of the batch, S new tokens of a row, L tokens that a row has room for, H/G query/kv heads on this rank, d
size of a head. A row table says which keys a row has; it is made once a forward and read by every layer.

On NVIDIA GPUs with bf16 or fp16 this is FlashAttention-2 (arXiv 2307.08691) as PyTorch carries it: kv heads are read
where they lie, keys past a row's own are not read, and a decode step is split over the keys (Flash-Decoding). Elsewhere
it is PyTorch's scaled dot-product attention with a mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FLASH_HEAD_DIM = 256
"""FlashAttention-2 has no kernel for larger heads."""


def row_table(starts: Tensor, lengths: Tensor | int, seq: int, room: int) -> Tensor:
    """Which keys the rows of a batch have, in the form that `attention` reads.

    Args:
        starts: int64 [B], tokens at the left of each row that are padding.
        lengths: int64 [B] or a number, tokens that each row held before the S new ones, padding included.
        seq: S.
        room: L.

    Returns:
        int32 [3, B + 1]: where a row's queries begin when all rows lie one behind the other (S apart); where its keys
        begin (L apart); how many keys its last query sees (the last column has no meaning).
    """
    batch = starts.shape[0]
    row = torch.arange(batch + 1, device=starts.device)
    num_keys = (lengths + seq - starts).clamp(min=0)
    first_key = row * room + F.pad(starts, (0, 1))
    return torch.stack([row * seq, first_key, F.pad(num_keys, (0, 1))]).to(torch.int32)


@torch.library.custom_op("bdlora::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Causal attention of each row's new tokens over the row's keys: query i of S sees all but the last S - 1 - i.

    Args:
        q: [B, H, S, d].
        k, v: [B, G, L, d], H a multiple of G. What lies outside a row's keys may hold anything, NaN included.
        rows: int32 [3, B + 1], see `row_table`.
        scale: of q k^T.

    Returns:
        [B, S, H, d], zero for a query that sees no key (padding).
    """
    return _masked(q, k, v, rows, scale)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float) -> Tensor:
    batch, heads, seq, head_dim = q.shape
    return q.new_empty(batch, seq, heads, head_dim)


@attention.register_kernel("cuda")
def _(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float) -> Tensor:
    return _flash(q, k, v, rows, scale) if has_flash(q.dtype, q.shape[3], q.device) else _masked(q, k, v, rows, scale)


def has_flash(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether FlashAttention-2 serves this dtype and size of a head on this device."""
    is_served = dtype in (torch.bfloat16, torch.float16) and head_dim <= FLASH_HEAD_DIM and head_dim % 8 == 0
    return (
        is_served
        and device.type == "cuda"
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float) -> Tensor:
    batch, heads, seq, head_dim = q.shape
    # Rows one behind the other; a view of a cache, whose tokens hold their heads together.
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    first_query, first_key, num_keys = rows.unbind()
    out, *_ = torch.ops.aten._flash_attention_forward(
        queries,
        keys,
        values,
        first_query,
        first_key,
        seq,
        k.shape[2],
        0.0,  # dropout
        True,  # causal: the last query is the row's last key
        False,  # no weights to look at
        scale=scale,
        seqused_k=num_keys[:batch],
    )
    return out.view(batch, seq, heads, head_dim)  # type: ignore[no-any-return]  # an operator's result


def _masked(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float) -> Tensor:
    batch, heads, seq, _ = q.shape
    groups, room = k.shape[1:3]
    number = torch.arange(room, device=q.device) - (rows[1, :batch] % room)[:, None]
    last = torch.arange(seq, device=q.device) + (rows[2, :batch] - seq)[:, None]
    is_own = (number >= 0) & (number < rows[2, :batch, None])
    sees = is_own[:, None, :] & (number[:, None, :] <= last[:, :, None])
    # What no query sees is replaced: weight zero times NaN would be NaN.
    keys, values = (x.masked_fill(~is_own[:, None, :, None], 0) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=sees[:, None], scale=scale, enable_gqa=heads != groups
    )
    return out.masked_fill(~sees.any(-1)[:, None, :, None], 0).transpose(1, 2).contiguous()
