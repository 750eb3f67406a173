"""h = A x. A split of the columns of A writes a plane of its own; whoever reads h sums the planes (no atomics).

    h [SPLITS, T, n, width] float32      n sites, width columns for each

Two forms: by token (decode: a vector product, bound by the bytes of A) and by segment (prefill: up to BLOCK_T tokens of
one slot share a read of A and use the tensor cores). `shrink_mixed.py` is either, segment by segment.
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.fields import (
    A_BLOCKS,
    A_OFFSET,
    A_RANK,
    NUM_FIELDS,
    VARYING,
    choose,
    known_multiple_of_8,
    let_next_kernel_start,
    load_segment,
    slot_row,
    wait_for_kernel_ahead,
)

PART_K: tl.constexpr = tl.constexpr(512)
"""Columns of packed factors that a program of `shrink_tokens` holds at once."""
NARROW: tl.constexpr = tl.constexpr(16)
"""The same where sizes are no multiples of 8: seldom, and must not cost the others registers (as in `expand.py`)."""


@triton.jit
def _h_of_packed_rows(
    x_row, a, rows, is_row, first_column, columns, begin, end,
    ROWS: tl.constexpr, PART: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """[ROWS] products of A's rows with the part of x that their block sees, over the columns begin..end of A.

    The part begins at ``first_column``. A is read before x is waited for.
    """
    total = tl.zeros([ROWS, PART], dtype=tl.float32)
    for start in range(begin, end, PART):
        k = start + tl.arange(0, PART)
        inside = is_row[:, None] & (k < end)[None, :]
        factor = tl.load(a + rows[:, None] * columns + k[None, :], mask=inside, other=0.0)
        wait_for_kernel_ahead(OVERLAP)
        let_next_kernel_start(OVERLAP)
        value = tl.load(x_row + first_column[:, None] + k[None, :], mask=inside, other=0.0)
        total += factor.to(tl.float32) * value.to(tl.float32)
    wait_for_kernel_ahead(OVERLAP)
    let_next_kernel_start(OVERLAP)
    return tl.sum(total, axis=1)


@triton.jit
def h_of_token(
    x_row, a, rows, is_row, rank, blocks, in_features, split,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """[ROWS] of h: a split's share of the columns of A. A is read before x is waited for."""
    if (blocks == 1) & (in_features % 8 == 0):
        # Known to be a multiple of 8: loads of 16 bytes.
        columns = known_multiple_of_8(in_features)
        k = split * BLOCK_K + tl.arange(0, BLOCK_K)
        factor = tl.load(
            a + rows[:, None] * columns + k[None, :], mask=is_row[:, None] & (k < columns)[None, :], other=0.0
        )
        wait_for_kernel_ahead(OVERLAP)
        let_next_kernel_start(OVERLAP)
        value = tl.load(x_row + k, mask=k < columns, other=0.0)
        total = tl.sum(factor.to(tl.float32) * value.to(tl.float32)[None, :], axis=1)
    else:
        columns = in_features // blocks
        first_column = rows // (rank // blocks) * columns
        share = tl.cdiv(tl.cdiv(columns, SPLITS), 8) * 8
        begin = split * share
        end = tl.minimum(begin + share, columns)
        if columns % 8 == 0:
            # Known to be multiples: loads of 16 bytes.
            total = _h_of_packed_rows(
                x_row, a, rows, is_row, known_multiple_of_8(first_column), known_multiple_of_8(columns),
                known_multiple_of_8(begin), known_multiple_of_8(end), ROWS, PART_K, OVERLAP,
            )  # fmt: skip
        else:
            total = _h_of_packed_rows(
                x_row, a, rows, is_row, first_column, columns, begin, end, ROWS, NARROW, OVERLAP
            )  # fmt: skip
    return total


@triton.jit(do_not_specialize=VARYING)
def shrink_tokens(
    x, pool, slots, token_slot, h,
    x_stride, in_features, num_slots, tokens, width, n_sites,
    site0, site1, site2,
    SPLITS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, sites, groups of ROWS rows x SPLITS). x [T, D] with rows ``x_stride`` apart.

    One block of A: a program holds ROWS rows of BLOCK_K columns at once, and the splits cover all columns.

    PARTS: h is [SPLITS, T, PARTS, n, width], and what is made is part PART of it; the same rows of others are zero.
    """
    token, index = tl.program_id(0), tl.program_id(1)
    group, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    chosen = tl.load(token_slot + token)
    slot = tl.maximum(chosen, 0)
    fields = slot_row(slots, choose(index, site0, site1, site2), slot, num_slots)
    rank = tl.load(fields + A_RANK).to(tl.int32)
    blocks = tl.load(fields + A_BLOCKS).to(tl.int32)
    a = pool + tl.multiple_of(tl.load(fields + A_OFFSET), 16)
    rows = group * ROWS + tl.arange(0, ROWS)
    if (chosen < 0) | (group * ROWS >= rank):
        wait_for_kernel_ahead(OVERLAP)
        return
    is_row = rows < rank
    plane = h + ((split * tokens + token).to(tl.int64) * (PARTS * n_sites) + index) * width
    total = h_of_token(
        x + token.to(tl.int64) * x_stride, a, rows, is_row, rank, blocks, in_features, split,
        SPLITS, ROWS, BLOCK_K, OVERLAP,
    )  # fmt: skip
    for part in tl.static_range(PARTS):
        value = total if part == PART else tl.zeros([ROWS], dtype=tl.float32)
        tl.store(plane + part * n_sites * width + rows, value, mask=is_row)


@triton.jit
def _segment_sums(
    x_rows, is_token, a, is_row, first_column, columns, begin, end, total,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_T, BLOCK_R] products over the columns begin..end of x; each row of A sees its own part of them."""
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        in_range = k < end
        value = tl.load(x_rows + k[None, :], mask=is_token[:, None] & in_range[None, :], other=0.0)
        within = k[:, None] - first_column[None, :]
        inside = (is_row[None, :] & in_range[:, None]) & ((within >= 0) & (within < columns[None, :]))
        factor = tl.load(a[None, :] + within, mask=inside, other=0.0)
        total = tl.dot(value, factor, total)
    return total


@triton.jit
def segment_sums(
    x_rows, is_token, a, row, is_row, first_column, columns, is_aligned, begin, end, total, BLOCK_K: tl.constexpr
):
    """`_segment_sums` with A's rows ``row``, for sizes that are multiples of 8 (``is_aligned``) and for others."""
    if is_aligned:
        # Known to be multiples: loads of 16 bytes.
        columns = known_multiple_of_8(columns)
        first_column = known_multiple_of_8(first_column)
        total = _segment_sums(
            x_rows, is_token, a + row * columns, is_row, first_column, columns, begin, end, total, BLOCK_K, None
        )  # fmt: skip
    else:
        total = _segment_sums(
            x_rows, is_token, a + row * columns, is_row, first_column, columns, begin, end, total, NARROW, 1
        )  # fmt: skip
    return total


@triton.jit(do_not_specialize=VARYING)
def shrink_segments(
    x, pool, slots, order, segments, h,
    x_stride, in_features, num_slots, tokens, width, n_sites,
    site0, site1, site2,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (segments, tiles of rows, SPLITS). A segment is (slot, start in ``order``, count up to BLOCK_T); 0 is none.

    The rows of all sites are stacked, ``width`` for each, so that x is read once for several sites.
    """
    segment, split = tl.program_id(0), tl.program_id(2)
    wait_for_kernel_ahead(OVERLAP)
    let_next_kernel_start(OVERLAP)
    slot, start, count = load_segment(segments, segment)
    if count == 0:
        return
    stacked = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    index = stacked // width
    row = stacked - index * width
    is_site = index < n_sites
    fields = slots + (choose(index, site0, site1, site2).to(tl.int64) * num_slots + slot) * NUM_FIELDS
    rank = tl.load(fields + A_RANK, mask=is_site, other=0).to(tl.int32)
    is_row = row < rank
    if tl.max(is_row.to(tl.int32), axis=0) == 0:
        return
    blocks = tl.load(fields + A_BLOCKS, mask=is_site, other=1).to(tl.int32)
    a = pool + tl.multiple_of(tl.load(fields + A_OFFSET, mask=is_row, other=0), 16)
    columns = in_features // blocks
    # A block of A sees its part of x: with several blocks the row is zero elsewhere, and nothing is loaded there.
    first_column = row // tl.maximum(rank // blocks, 1) * columns
    share = tl.cdiv(tl.cdiv(in_features, SPLITS), BLOCK_K) * BLOCK_K
    begin = split * share
    end = tl.minimum(begin + share, in_features)
    t = tl.arange(0, BLOCK_T)
    is_token = t < count
    token = tl.load(order + start + t, mask=is_token, other=0).to(tl.int64)
    x_rows = x + token[:, None] * x_stride
    total = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    is_aligned = tl.max(columns % 8, axis=0) == 0
    total = segment_sums(
        x_rows, is_token, a, row, is_row, first_column, columns, is_aligned, begin, end, total, BLOCK_K
    )
    planes = h + (split * tokens + token) * (n_sites * width)
    tl.store(planes[:, None] + stacked[None, :], total, mask=is_token[:, None] & is_row[None, :])
