"""`delta.py` for tokens grouped by slot: several that share one on the tensor cores, others each by itself.

These share a read of B. One launch, and so one recorded graph, serves any mix of adapters.
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.delta import factor_of, rows_that_write, write_delta_of_token
from bdlora_compile.runtime.kernels.expand import h_of_segment
from bdlora_compile.runtime.kernels.fields import (
    VARYING,
    choose,
    known_multiple_of_8,
    let_next_kernel_start,
    load_b,
    load_place,
    site_and_tile,
    wait_for_kernel_ahead,
)

LEAST_ROWS: tl.constexpr = tl.constexpr(16)
"""Rows of B that the tensor cores take at once, and at least."""


@triton.jit
def _write_delta_of_segment(
    rows_of_site, h_rows, plane_stride, is_token, b, start, scale, tile, size, room, rank, blocks, index, width,
    n_sites,
    PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
    IS_PACKED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A tile of columns of one site, of all tokens of a segment."""
    height = tl.maximum(rank // blocks, 1)
    columns, start = known_multiple_of_8(size // blocks), known_multiple_of_8(start)
    column = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    o = column - start
    is_column = (o >= 0) & (o < size)
    begin, end = rows_that_write(tile, size, columns, height, start, rank, BLOCK_O)
    total = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    # One stage: loads of later turns would pass the wait.
    for first in tl.range(begin, end, LEAST_ROWS, num_stages=1):
        row = first + tl.arange(0, LEAST_ROWS)
        factor = load_b(b, row, row < end, o, is_column, height, columns, IS_PACKED)
        wait_for_kernel_ahead(OVERLAP)
        let_next_kernel_start(OVERLAP)
        large, rest = h_of_segment(
            h_rows, plane_stride, is_token, row, end, rank, index, width, n_sites,
            PLANES, PARTS, BLOCK_T, LEAST_ROWS, b.dtype.element_ty,
        )  # fmt: skip
        total = tl.dot(large, factor, total)
        total = tl.dot(rest, factor, total)
    wait_for_kernel_ahead(OVERLAP)
    at = rows_of_site[:, None] + column[None, :]
    tl.store(at, (scale * total).to(rows_of_site.dtype.element_ty), mask=is_token[:, None] & (column < room)[None, :])


@triton.jit(do_not_specialize=VARYING)
def delta_mixed(
    delta, h, pool, slots, scales, order, segments,
    num_slots, tokens, width, n_sites, site0, site1, site2,
    OUT0: tl.constexpr, OUT1: tl.constexpr, OUT2: tl.constexpr, ROOM0: tl.constexpr, ROOM1: tl.constexpr,
    ROOM2: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr, SHARES: tl.constexpr, TOGETHER: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (places in the order of the tokens, column tiles of all sites); else as `delta_tokens`.

    A tile of a segment of TOGETHER tokens or more, up to BLOCK_T, is cut into SHARES, of which its first programs have
    one each, for all of the segment's tokens; the others end. OVERLAP: the order and the segments, too, are read before
    the kernel ahead has ended.
    """
    tl.static_assert(SHARES <= TOGETHER, "a segment has a program for each share")
    place = tl.program_id(0)
    token = tl.load(order + place).to(tl.int64)
    chosen, begin, count = load_place(segments, place)
    index, tile = site_and_tile(tl.program_id(1), tl.cdiv(ROOM0, BLOCK_O), tl.cdiv(ROOM1, BLOCK_O))
    site, size = choose(index, site0, site1, site2), choose(index, OUT0, OUT1, OUT2)
    rank, blocks, b, start, scale = factor_of(pool, slots, scales, site, chosen, num_slots)
    row_size = PARTS * n_sites * width
    plane_stride = tokens.to(tl.int64) * row_size
    ROOM: tl.constexpr = ROOM0 + ROOM1 + ROOM2
    first_row, room = delta + choose(index, 0, ROOM0, ROOM0 + ROOM1), choose(index, ROOM0, ROOM1, ROOM2)
    if (count >= TOGETHER) & (size // blocks % 8 == 0) & (start % 8 == 0):
        share = place - begin
        # Who waits for this kernel waits for the one ahead, too, if some programs do; the others make room at once.
        if share >= SHARES:
            return
        t = tl.arange(0, BLOCK_T)
        is_token = t < count
        all_tokens = tl.load(order + begin + t, mask=is_token, other=0).to(tl.int64)
        rows, h_rows, own_tile = first_row + all_tokens * ROOM, h + all_tokens * row_size, tile * SHARES + share
        if blocks == 1:
            _write_delta_of_segment(
                rows, h_rows, plane_stride, is_token, b, start, scale, own_tile, size, room, rank, blocks, index, width,
                n_sites, PLANES, PARTS, BLOCK_T, BLOCK_O // SHARES, False, OVERLAP,
            )  # fmt: skip
        else:
            _write_delta_of_segment(
                rows, h_rows, plane_stride, is_token, b, start, scale, own_tile, size, room, rank, blocks, index, width,
                n_sites, PLANES, PARTS, BLOCK_T, BLOCK_O // SHARES, True, OVERLAP,
            )  # fmt: skip
    else:
        write_delta_of_token(
            first_row + token * ROOM, h + token * row_size, plane_stride, b, start, scale, tile, size, room,
            rank, blocks, index, width, n_sites, PLANES, PARTS, BLOCK_R, BLOCK_O, OVERLAP,
        )  # fmt: skip
