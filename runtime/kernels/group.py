"""Grouping tokens by slot in one small launch: place each token by counting, number segments by a running sum."""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.fields import SEGMENT_FIELDS

CHUNK: tl.constexpr = tl.constexpr(32)
LAST: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["tokens"])
def group_tokens(token_slot, order, segments, tokens, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program for up to BLOCK tokens. order and segments as `launch.segment_work` returns them."""
    t = tl.arange(0, BLOCK)
    is_token = t < tokens
    slot = tl.load(token_slot + t, mask=is_token, other=LAST)
    first = tl.zeros([BLOCK], dtype=tl.int32)
    count = tl.zeros([BLOCK], dtype=tl.int32)
    ahead = tl.zeros([BLOCK], dtype=tl.int32)
    for begin in range(0, tokens, CHUNK):
        j = begin + tl.arange(0, CHUNK)
        other = tl.load(token_slot + j, mask=j < tokens, other=LAST)
        same = (other[None, :] == slot[:, None]) & (j < tokens)[None, :]
        first += tl.sum((other[None, :] < slot[:, None]).to(tl.int32), axis=1)
        count += tl.sum(same.to(tl.int32), axis=1)
        ahead += tl.sum((same & (j[None, :] < t[:, None])).to(tl.int32), axis=1)
    position = first + ahead
    tl.store(order + position, t, mask=is_token)
    # The segment that this token's place lies in begins so many places ahead.
    inside = ahead % SIZE
    place = segments + position * SEGMENT_FIELDS
    tl.store(place + 3, slot, mask=is_token)
    tl.store(place + 4, position - inside, mask=is_token)
    tl.store(place + 5, tl.where(slot < 0, 0, tl.minimum(count - ahead + inside, SIZE)), mask=is_token)
    tl.debug_barrier()
    # From here on t is a place.
    place = segments + t * SEGMENT_FIELDS
    start = tl.load(place + 4, mask=is_token, other=0)
    count = tl.load(place + 5, mask=is_token, other=0)
    begins = (count > 0) & (start == t)
    number = tl.cumsum(begins.to(tl.int32), axis=0) - 1
    row = segments + number * SEGMENT_FIELDS
    tl.store(row, tl.load(place + 3, mask=begins, other=0), mask=begins)
    tl.store(row + 1, t, mask=begins)
    tl.store(row + 2, count, mask=begins)
    behind = is_token & (t >= tl.sum(begins.to(tl.int32), axis=0))
    for column in tl.static_range(3):
        tl.store(place + column, tl.zeros([BLOCK], dtype=tl.int32), mask=behind)
