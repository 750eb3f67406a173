"""LoRA on an embedding as graph operators: A is looked up by token id; B follows by `lora_expand`, as anywhere else.

    lora_lookup   h = A one_hot(id)            ids [...] -> h [T, n * width]
    token_grid    slots of the tokens of x     x [batch, seq, D] -> int32 [batch, seq]

Legend as in `ops.py`. A slot's A at an embedding lies transposed in the pool, [V_loc, r]: what one token reads is
contiguous. Both operators are made of torch calls without a look at the data: they run on any device and may be
captured in a CUDA graph.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bdlora_compile.runtime.ops import SlotField, accumulate_dtype


@torch.library.custom_op("bdlora::lora_lookup", mutates_args=())
def lora_lookup(
    ids: Tensor, pool: Tensor, slots: Tensor, token_slot: Tensor, sites: Sequence[int], width: int, length: int
) -> Tensor:
    """h = the column of A that each token's id names, with the A of its slot.

    Args:
        ids: int64 [...], counted from the first id of this rank's piece of the vocabulary; T tokens in all.
        pool, slots, token_slot, sites, width: as for `lora_shrink`; each slot's A is [length, r].
        length: ids of a piece. Tokens with another id are another rank's.

    Returns:
        [T, n * width] like that of `lora_shrink`; tokens of other ranks' ids are zero.
    """
    ids = ids.reshape(-1)
    slot = token_slot[: ids.shape[0]].long()
    is_own = (ids >= 0) & (ids < length) & (slot >= 0)
    column = torch.arange(width, device=ids.device)
    parts = []
    for site in sites:
        fields = slots[site].index_select(0, slot.clamp(min=0))
        rank = fields[:, SlotField.A_RANK, None]
        is_read = is_own[:, None] & (column < rank)
        index = fields[:, SlotField.A_OFFSET, None] + ids[:, None] * rank + column
        # What is not read may lie outside of the pool: its first element stands in for it.
        found = pool[torch.where(is_read, index, 0)].to(accumulate_dtype(pool.dtype))
        parts.append(torch.where(is_read, found, 0.0))
    return torch.cat(parts, dim=1)


@lora_lookup.register_fake
def _(
    ids: Tensor, pool: Tensor, slots: Tensor, token_slot: Tensor, sites: Sequence[int], width: int, length: int
) -> Tensor:
    return pool.new_empty(math.prod(ids.shape), len(sites) * width, dtype=accumulate_dtype(pool.dtype))


@torch.library.custom_op("bdlora::token_grid", mutates_args=())
def token_grid(token_slot: Tensor, x: Tensor) -> Tensor:
    """The slot of each token of a forward whose hidden state is ``x`` [batch, seq, D]: a copy, int32 [batch, seq]."""
    batch, seq = x.shape[:2]
    return token_slot[: batch * seq].view(batch, seq).clone()


@token_grid.register_fake
def _(token_slot: Tensor, x: Tensor) -> Tensor:
    return token_slot.new_empty(x.shape[:2])
