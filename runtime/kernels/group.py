"""Grouping tokens by slot in one small launch: place each token by counting, number segments by a running sum."""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.fields import SEGMENT_FIELDS

CHUNK: tl.constexpr = tl.constexpr(32)
LAST: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["tokens"])
def group_tokens(token_slot, order, segments, scratch, tokens, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program for up to BLOCK tokens. scratch int32 [3, tokens]; the rest as `launch.segment_work` returns it."""
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
    # Where this token's place lies: the segment begins so many places ahead.
    behind_begin = ahead % SIZE
    place = segments + position * SEGMENT_FIELDS
    tl.store(place + 3, slot, mask=is_token)
    tl.store(place + 4, position - behind_begin, mask=is_token)
    own_count = tl.where(slot < 0, 0, tl.minimum(count - ahead + behind_begin, SIZE))
    tl.store(place + 5, own_count, mask=is_token)
    begins = (slot >= 0) & (behind_begin == 0)
    tl.store(scratch + position, begins.to(tl.int32), mask=is_token)
    tl.store(scratch + tokens + position, slot, mask=is_token)
    tl.store(scratch + 2 * tokens + position, tl.minimum(count - ahead, SIZE), mask=is_token)
    tl.debug_barrier()
    # From here on t is a position in the order.
    begins_here = tl.load(scratch + t, mask=is_token, other=0)
    number = tl.cumsum(begins_here, axis=0) - 1
    row = segments + number * SEGMENT_FIELDS
    is_begin = is_token & (begins_here == 1)
    tl.store(row, tl.load(scratch + tokens + t, mask=is_begin, other=0), mask=is_begin)
    tl.store(row + 1, t, mask=is_begin)
    tl.store(row + 2, tl.load(scratch + 2 * tokens + t, mask=is_begin, other=0), mask=is_begin)
    behind = is_token & (t >= tl.sum(begins_here, axis=0))
    for column in tl.static_range(3):
        tl.store(segments + t * SEGMENT_FIELDS + column, tl.zeros([BLOCK], dtype=tl.int32), mask=behind)
