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
        begin (L apart); how many keys its last query sees. The last column ends the first two, and has none of these.
    """
    row = torch.arange(starts.shape[0] + 1, device=starts.device)
    num_keys = (lengths + seq - starts).clamp(min=0)
    first_key = row * room + F.pad(starts, (0, 1))
    return torch.stack([row * seq, first_key, F.pad(num_keys, (0, 1))]).to(torch.int32)


def per_head(rows: Tensor, heads: int) -> Tensor:
    """The table int32 [3, B G + 1] in which each of G kv heads of each row is a sequence with queries of its own."""
    batch = rows.shape[1] - 1
    size = rows[:2, -1:] // batch
    number = torch.arange(batch * heads + 1, device=rows.device, dtype=torch.int32)
    starts, num_keys = rows[1, :-1] % size[1], rows[2, :-1]
    own = torch.stack([torch.zeros_like(starts), starts, num_keys])[:, :, None].expand(3, batch, heads).flatten(1)
    return F.pad(own, (0, 1)) + F.pad(size * number, (0, 0, 0, 1))


@torch.library.custom_op("bdlora::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Causal attention of each row's new tokens over the row's keys: query i of S sees all but the last S - 1 - i.

    Args:
        q: [B, H, S, d].
        k, v: [B, G, L, d], H a multiple of G. What lies outside a row's keys may hold anything, NaN included.
        rows: int32 [3, B + 1], see `row_table`; or [3, B G + 1], see `per_head`, which saves every layer that step.
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
    groups, room = k.shape[1:3]
    if rows.shape[1] != batch * groups + 1:
        rows = per_head(rows, groups)
    # With one kv head each, sequences need no copies: a step's queries and a cache's keys are views.
    queries = q.unflatten(1, (groups, -1)).transpose(2, 3).reshape(-1, heads // groups, head_dim)
    keys, values = (x.reshape(-1, 1, head_dim) for x in (k, v))
    first_query, first_key, num_keys = rows.unbind()
    out, *_ = torch.ops.aten._flash_attention_forward(
        queries,
        keys,
        values,
        first_query,
        first_key,
        seq,
        room,
        0.0,  # dropout
        True,  # causal: the last query is the sequence's last key
        False,  # no weights to look at
        scale=scale,
        seqused_k=num_keys[:-1],
    )
    whole = out.view(batch, groups, seq, heads // groups, head_dim).transpose(1, 2)
    return whole.reshape(batch, seq, heads, head_dim)  # type: ignore[no-any-return]  # an operator's result


def _masked(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float) -> Tensor:
    batch, heads, seq, _ = q.shape
    groups, room = k.shape[1:3]
    # The first sequence of each row says it all.
    _, first_key, num_keys = rows[:, :-1].unflatten(1, (batch, -1))[:, :, :1].unbind()
    number = torch.arange(room, device=q.device) - first_key % room
    last = torch.arange(seq, device=q.device) + num_keys - seq
    is_own = (number >= 0) & (number < num_keys)
    sees = is_own[:, None, :] & (number[:, None, :] <= last[:, :, None])
    # What no query sees is replaced: weight zero times NaN would be NaN.
    keys, values = (x.masked_fill(~is_own[:, None, :, None], 0) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=sees[:, None], scale=scale, enable_gqa=heads != groups
    )
    return out.masked_fill(~sees.any(-1)[:, None, :, None], 0).transpose(1, 2).contiguous()
