"""h = A x of few tokens grouped by slot: who is alone in a segment by a vector product, several on the tensor cores.

These share a read of A. One launch, and so one recorded graph, serves any mix of adapters. h as in `shrink.py`.
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.fields import (
    A_BLOCKS,
    A_OFFSET,
    A_RANK,
    VARYING,
    choose,
    let_next_kernel_start,
    load_segment,
    slot_row,
    wait_for_kernel_ahead,
)
from bdlora_compile.runtime.kernels.shrink import h_of_token, segment_sums

LEAST_ROWS: tl.constexpr = tl.constexpr(16)
"""Rows of A that the tensor cores take at least."""


@triton.jit
def _h_alone(
    x, a, order, plane, rank, blocks, x_stride, in_features, token_stride, group, split,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Of the one token of a segment, BLOCK_K columns."""
    token = tl.load(order).to(tl.int64)
    rows = group * ROWS + tl.arange(0, ROWS)
    total = h_of_token(
        x + token * x_stride, a, rows, rows < rank, rank, blocks, in_features, split, SPLITS, ROWS, BLOCK_K, OVERLAP
    )
    tl.store(plane + token * token_stride + rows, total, mask=rows < rank)


@triton.jit
def _h_together(
    x, a, order, plane, rank, blocks, x_stride, in_features, token_stride, group, split, count,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, PART_K: tl.constexpr, BLOCK_T: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Of all ``count`` tokens of a segment, a split's share of the columns in turns of PART_K."""
    BLOCK_R: tl.constexpr = ROWS if ROWS > LEAST_ROWS else LEAST_ROWS
    own, t = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T)
    row, is_token = group * ROWS + own, t < count
    is_row = (own < ROWS) & (row < rank)
    token = tl.load(order + t, mask=is_token, other=0).to(tl.int64)
    x_rows = x + token[:, None] * x_stride
    # A block of A sees its part of x.
    columns = in_features // blocks + tl.zeros_like(own)
    first_column = row // tl.maximum(rank // blocks, 1) * columns
    share = tl.cdiv(tl.cdiv(in_features, SPLITS), PART_K) * PART_K
    begin, end = split * share, tl.minimum((split + 1) * share, in_features)
    total = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    wait_for_kernel_ahead(OVERLAP)
    let_next_kernel_start(OVERLAP)
    is_aligned = (in_features // blocks) % 8 == 0
    total = segment_sums(x_rows, is_token, a, row, is_row, first_column, columns, is_aligned, begin, end, total, PART_K)
    at = plane + token * token_stride
    tl.store(at[:, None] + row[None, :], total, mask=is_token[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=VARYING)
def shrink_mixed(
    x, pool, slots, order, segments, h,
    x_stride, in_features, num_slots, tokens, width, n_sites,
    site0, site1, site2,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PART_K: tl.constexpr, BLOCK_T: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (segments, sites, groups of ROWS rows x SPLITS). Segments of up to BLOCK_T tokens as for `shrink_segments`.

    OVERLAP: the table, the pool, and the segments are read before the kernel ahead in the stream has ended.
    """
    segment, index = tl.program_id(0), tl.program_id(1)
    group, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    slot, start, count = load_segment(segments, segment)
    fields = slot_row(slots, choose(index, site0, site1, site2), slot, num_slots)
    rank = tl.load(fields + A_RANK).to(tl.int32)
    blocks = tl.load(fields + A_BLOCKS).to(tl.int32)
    a = pool + tl.multiple_of(tl.load(fields + A_OFFSET), 16)
    if (count == 0) | (group * ROWS >= rank):
        # Who waits for this kernel waits for the one ahead, too, if some programs do; the others make room at once.
        if segment == 0:
            wait_for_kernel_ahead(OVERLAP)
        return
    token_stride = n_sites * width
    plane = h + split * tokens.to(tl.int64) * token_stride + index * width
    if count == 1:
        _h_alone(
            x, a, order + start, plane, rank, blocks, x_stride, in_features, token_stride, group, split,
            SPLITS, ROWS, BLOCK_K, OVERLAP,
        )  # fmt: skip
    else:
        _h_together(
            x, a, order + start, plane, rank, blocks, x_stride, in_features, token_stride, group, split, count,
            SPLITS, ROWS, PART_K, BLOCK_T, OVERLAP,
        )  # fmt: skip
