"""h = A x. A split of the columns of A writes a plane of its own; whoever reads h sums the planes (no atomics).

    h [SPLITS, T, n, width] float32      n sites, width columns for each

Two forms: by token (decode: a vector product, bound by the bytes of A) and by segment (prefill: up to BLOCK_T tokens of
one slot share a read of A and use the tensor cores).
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.fields import A_BLOCKS, A_OFFSET, A_RANK, choose, slot_row

_VARYING = ["num_slots", "tokens", "site0", "site1", "site2"]
"""Numbers that differ from layer to layer or from call to call: one compiled kernel serves all of them."""


@triton.jit
def _rows_of_token(x_row, a, rows, is_row, height, columns, begin, end, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_R] sums of A's rows times x over columns begin..end; a row's block says which part of x it sees."""
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    part = rows // height * columns
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = is_row[:, None] & (k < end)[None, :]
        factor = tl.load(a + rows[:, None] * columns + k[None, :], mask=inside, other=0.0)
        value = tl.load(x_row + part[:, None] + k[None, :], mask=inside, other=0.0)
        total += tl.sum(factor.to(tl.float32) * value.to(tl.float32), axis=1)
    return total


@triton.jit(do_not_specialize=_VARYING)
def shrink_tokens(
    x, pool, slots, token_slot, h,
    x_stride, in_features, num_slots, tokens, width,
    site0, site1, site2,
    N_SITES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, sites, SPLITS). x [T, D] with rows ``x_stride`` apart."""
    token, index, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(token_slot + token)
    if slot < 0:
        return
    row = slot_row(slots, choose(index, site0, site1, site2), slot, num_slots)
    rank = tl.load(row + A_RANK).to(tl.int32)
    blocks = tl.load(row + A_BLOCKS).to(tl.int32)
    a = pool + tl.multiple_of(tl.load(row + A_OFFSET), 16)
    columns = in_features // blocks
    height = rank // blocks
    share = tl.cdiv(tl.cdiv(columns, SPLITS), BLOCK_K) * BLOCK_K
    begin = split * share
    end = tl.minimum(begin + share, columns)
    x_row = x + token.to(tl.int64) * x_stride
    plane = h + ((split * tokens + token).to(tl.int64) * N_SITES + index) * width
    for first in range(0, rank, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        is_row = rows < rank
        if columns % 8 == 0:
            # Known to be a multiple: loads of 16 bytes.
            aligned = tl.multiple_of(columns, 8)
            total = _rows_of_token(x_row, a, rows, is_row, height, aligned, begin, end, BLOCK_R, BLOCK_K)
        else:
            total = _rows_of_token(x_row, a, rows, is_row, height, columns, begin, end, BLOCK_R, BLOCK_K)
        tl.store(plane + rows, total, mask=is_row)


@triton.jit(do_not_specialize=_VARYING)
def shrink_segments(
    x, pool, slots, order, segments, h,
    x_stride, in_features, num_slots, tokens, width,
    site0, site1, site2,
    N_SITES: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (segments, sites, SPLITS). A segment is (slot, start in ``order``, count up to BLOCK_T); count 0 is none."""
    segment, index, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(segments + segment * 3 + 2)
    if count == 0:
        return
    slot = tl.load(segments + segment * 3)
    start = tl.load(segments + segment * 3 + 1)
    row = slot_row(slots, choose(index, site0, site1, site2), slot, num_slots)
    rank = tl.load(row + A_RANK).to(tl.int32)
    blocks = tl.load(row + A_BLOCKS).to(tl.int32)
    a = pool + tl.multiple_of(tl.load(row + A_OFFSET), 16)
    columns = in_features // blocks
    height = rank // blocks
    share = tl.cdiv(tl.cdiv(columns, SPLITS), BLOCK_K) * BLOCK_K
    begin = split * share
    end = tl.minimum(begin + share, columns)
    t = tl.arange(0, BLOCK_T)
    is_token = t < count
    token = tl.load(order + start + t, mask=is_token, other=0).to(tl.int64)
    x_rows = x + token[:, None] * x_stride
    planes = h + ((split * tokens + token) * N_SITES + index) * width
    for block in range(blocks):
        for first in range(0, height, BLOCK_R):
            rows = first + tl.arange(0, BLOCK_R)
            is_row = rows < height
            total = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
            for from_column in range(begin, end, BLOCK_K):
                k = from_column + tl.arange(0, BLOCK_K)
                in_range = k < end
                value = tl.load(
                    x_rows + block * columns + k[None, :], mask=is_token[:, None] & in_range[None, :], other=0.0
                )
                factor = tl.load(
                    a + (block * height + rows)[None, :] * columns + k[:, None],
                    mask=is_row[None, :] & in_range[:, None],
                    other=0.0,
                )
                total = tl.dot(value, factor, total)
            tl.store(
                planes[:, None] + (block * height + rows)[None, :], total, mask=is_token[:, None] & is_row[None, :]
            )
