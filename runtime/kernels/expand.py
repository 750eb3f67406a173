"""y += scale * (B h), in place: each program owns some columns of y for one token or one segment.

h is read as [PLANES, T, PARTS, n, width]: planes are summed (splits of the shrink), parts lie side by side (the ranks
of a gather, each with an equal share of a slot's rank at the left).
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.fields import (
    B_BLOCKS,
    B_OFFSET,
    B_RANK,
    OUT_START,
    choose,
    h_offset,
    known_multiple_of_8,
    let_next_kernel_start,
    load_b,
    load_h,
    load_segment,
    rows_of_tile,
    site_and_tile,
    slot_row,
    wait_for_kernel_ahead,
)

_VARYING = ["num_slots", "tokens", "n_sites", "tiles0", "tiles1", "site0", "site1", "site2"]
"""Numbers that differ from layer to layer or from call to call: one compiled kernel serves all of them."""


NARROW: tl.constexpr = tl.constexpr(16)
"""Columns that `expand_segments` holds at once where sizes are no multiples of 8; `expand_tokens` holds one row of B.
Such sizes are seldom, and must not cost the others registers: a kernel has as many as its greediest branch."""


@triton.jit
def b_h_of_token(
    h_token, plane_stride, b, o, is_column, begin, end, rank, height, columns, index, width, n_sites,
    PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, IS_PACKED: tl.constexpr, OVERLAP: tl.constexpr,
    LETS_NEXT_START: tl.constexpr,
):  # fmt: skip
    """B h at some of B's columns, of its rows begin..end. The first of them are read before h is waited for."""
    total = tl.zeros(o.shape, dtype=tl.float32)
    for first in range(begin, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        factor = load_b(b, row, row < end, o, is_column, height, columns, IS_PACKED)
        wait_for_kernel_ahead(OVERLAP)
        let_next_kernel_start(LETS_NEXT_START)
        value = load_h(h_token + h_offset(row, rank, index, width, n_sites, PARTS), plane_stride, row < end, PLANES)
        total += tl.sum(value[:, None] * factor.to(tl.float32), axis=0)
    return total


@triton.jit
def _add_to_token(
    y_row, h_token, plane_stride, b, scale, tile, size, start, y_columns, rank, blocks, columns, index, width, n_sites,
    PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
    IS_PACKED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add B h to the columns of one tile, for one token."""
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    is_column = (o < size) & (start + o < y_columns)
    # Neither y nor B waits for h: their loads are under way while the shrink ends.
    before = tl.load(y_row + start + o, mask=is_column, other=0.0)
    height = rank // blocks
    begin, end = rows_of_tile(tile, size, columns, height, BLOCK_O)
    total = b_h_of_token(
        h_token, plane_stride, b, o, is_column, begin, end, rank, height, columns, index, width, n_sites,
        PLANES, PARTS, BLOCK_R, IS_PACKED, OVERLAP, False,
    )  # fmt: skip
    tl.store(y_row + start + o, (before.to(tl.float32) + scale * total).to(before.dtype), mask=is_column)


@triton.jit(do_not_specialize=_VARYING)
def expand_tokens(
    y, h, pool, slots, scales, token_slot,
    y_stride, y_columns, num_slots, tokens, width, n_sites, tiles0, tiles1,
    site0, site1, site2, out0, out1, out2,
    PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, column tiles of all sites). y [T, O], rows ``y_stride`` apart. OVERLAP as in `expand_segments`."""
    token = tl.program_id(0)
    chosen = tl.load(token_slot + token)
    slot = tl.maximum(chosen, 0)
    index, tile = site_and_tile(tl.program_id(1), tiles0, tiles1)
    site = choose(index, site0, site1, site2)
    size = choose(index, out0, out1, out2)
    fields = slot_row(slots, site, slot, num_slots)
    rank = tl.load(fields + B_RANK).to(tl.int32)
    if (chosen < 0) | (rank == 0):
        wait_for_kernel_ahead(OVERLAP)
        return
    blocks = tl.load(fields + B_BLOCKS).to(tl.int32)
    b = pool + tl.multiple_of(tl.load(fields + B_OFFSET), 16)
    start = choose(index, 0, out0, out0 + out1) + tl.load(fields + OUT_START).to(tl.int32)
    scale = tl.load(scales + site.to(tl.int64) * num_slots + slot)
    columns = size // blocks
    y_row = y + token.to(tl.int64) * y_stride
    row_size = PARTS * n_sites * width
    h_token = h + token.to(tl.int64) * row_size
    plane_stride = tokens.to(tl.int64) * row_size
    if (columns % 8 == 0) & (start % 8 == 0):
        # Known to be multiples: loads of 16 bytes.
        columns = known_multiple_of_8(columns)
        start = known_multiple_of_8(start)
        if blocks == 1:
            _add_to_token(
                y_row, h_token, plane_stride, b, scale, tile, size, start, y_columns, rank, blocks, columns, index,
                width, n_sites, PLANES, PARTS, BLOCK_R, BLOCK_O, False, OVERLAP,
            )  # fmt: skip
        else:
            # A tile meets few of the blocks, whose rows are few.
            _add_to_token(
                y_row, h_token, plane_stride, b, scale, tile, size, start, y_columns, rank, blocks, columns, index,
                width, n_sites, PLANES, PARTS, (BLOCK_R + 1) // 2, BLOCK_O, True, OVERLAP,
            )  # fmt: skip
    else:
        _add_to_token(
            y_row, h_token, plane_stride, b, scale, tile, size, start, y_columns, rank, blocks, columns, index,
            width, n_sites, PLANES, PARTS, 1, BLOCK_O, True, OVERLAP,
        )  # fmt: skip


@triton.jit
def h_of_segment(
    h_rows, plane_stride, is_token, row, end, rank, index, width, n_sites,
    PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """h [BLOCK_T, BLOCK_R] as two numbers of the factors' dtype, a large part and the rest: 16 bits with bf16."""
    at = h_rows[:, None] + h_offset(row, rank, index, width, n_sites, PARTS)[None, :]
    value = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    for plane in tl.static_range(PLANES):
        value += tl.load(at + plane * plane_stride, mask=is_token[:, None] & (row < end)[None, :], other=0.0)
    # fp16 ends at 65504: beyond, the large part would be infinite, and so the rest.
    large = (tl.minimum(tl.maximum(value, -65504.0), 65504.0) if DTYPE.is_fp16() else value).to(DTYPE)
    return large, (value - large.to(tl.float32)).to(DTYPE)


@triton.jit
def _add_to_segment(
    y_rows, h_rows, plane_stride, is_token, b, scale, first_tile, size, start, y_columns, rank, blocks, columns, index,
    width, n_sites,
    PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
    REPEAT: tl.constexpr, IS_PACKED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add B h to the columns of REPEAT tiles, for the tokens of one segment; h is read once where it fits a tile."""
    height = rank // blocks
    dtype: tl.constexpr = b.dtype.element_ty
    o = first_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    is_column = (o < size) & (start + o < y_columns)
    before = tl.load(y_rows[:, None] + (start + o)[None, :], mask=is_token[:, None] & is_column[None, :], other=0.0)
    if (rank <= BLOCK_R) & (REPEAT > 1):
        row = tl.arange(0, BLOCK_R)
        factor = load_b(b, row, row < rank, o, is_column, height, columns, IS_PACKED)
        wait_for_kernel_ahead(OVERLAP)
        large, rest = h_of_segment(
            h_rows, plane_stride, is_token, row, rank, rank, index, width, n_sites,
            PLANES, PARTS, BLOCK_T, BLOCK_R, dtype,
        )  # fmt: skip
        for step in range(REPEAT):
            following = o + BLOCK_O
            is_following = (following < size) & (start + following < y_columns) & (step + 1 < REPEAT)
            next_before = tl.load(
                y_rows[:, None] + (start + following)[None, :],
                mask=is_token[:, None] & is_following[None, :],
                other=0.0,
            )
            next_factor = load_b(b, row, row < rank, following, is_following, height, columns, IS_PACKED)
            total = tl.dot(large, factor)
            total = tl.dot(rest, factor, total)
            tl.store(
                y_rows[:, None] + (start + o)[None, :], (before.to(tl.float32) + scale * total).to(before.dtype),
                mask=is_token[:, None] & is_column[None, :],
            )  # fmt: skip
            o, is_column, before, factor = following, is_following, next_before, next_factor
    else:
        for step in range(REPEAT):
            if step > 0:
                o = o + BLOCK_O
                is_column = (o < size) & (start + o < y_columns)
                before = tl.load(
                    y_rows[:, None] + (start + o)[None, :], mask=is_token[:, None] & is_column[None, :], other=0.0
                )
            begin, end = rows_of_tile(first_tile + step, size, columns, height, BLOCK_O)
            total = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
            for first in range(begin, end, BLOCK_R):
                row = first + tl.arange(0, BLOCK_R)
                factor = load_b(b, row, row < end, o, is_column, height, columns, IS_PACKED)
                wait_for_kernel_ahead(OVERLAP)
                large, rest = h_of_segment(
                    h_rows, plane_stride, is_token, row, end, rank, index, width, n_sites,
                    PLANES, PARTS, BLOCK_T, BLOCK_R, dtype,
                )  # fmt: skip
                total = tl.dot(large, factor, total)
                total = tl.dot(rest, factor, total)
            tl.store(
                y_rows[:, None] + (start + o)[None, :], (before.to(tl.float32) + scale * total).to(before.dtype),
                mask=is_token[:, None] & is_column[None, :],
            )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def expand_segments(
    y, h, pool, slots, scales, order, segments,
    y_stride, y_columns, num_slots, tokens, width, n_sites, tiles0, tiles1,
    site0, site1, site2, out0, out1, out2,
    PLANES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
    REPEAT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (segments, groups of REPEAT column tiles of all sites).

    OVERLAP: the kernel ahead is the shrink of this h, which has waited for whoever wrote y: only h is waited for.
    """
    segment = tl.program_id(0)
    slot, first_token, count = load_segment(segments, segment)
    index, tile = site_and_tile(tl.program_id(1), tiles0, tiles1)
    site = choose(index, site0, site1, site2)
    size = choose(index, out0, out1, out2)
    fields = slot_row(slots, site, slot, num_slots)
    rank = tl.load(fields + B_RANK).to(tl.int32)
    if (count == 0) | (rank == 0):
        wait_for_kernel_ahead(OVERLAP)
        return
    blocks = tl.load(fields + B_BLOCKS).to(tl.int32)
    b = pool + tl.multiple_of(tl.load(fields + B_OFFSET), 16)
    start = choose(index, 0, out0, out0 + out1) + tl.load(fields + OUT_START).to(tl.int32)
    scale = tl.load(scales + site.to(tl.int64) * num_slots + slot)
    columns = size // blocks
    first_tile = tile * REPEAT
    t = tl.arange(0, BLOCK_T)
    is_token = t < count
    token = tl.load(order + first_token + t, mask=is_token, other=0).to(tl.int64)
    y_rows = y + token * y_stride
    row_size = PARTS * n_sites * width
    h_rows = h + token * row_size
    plane_stride = tokens.to(tl.int64) * row_size
    if (columns % 8 == 0) & (start % 8 == 0):
        # Known to be multiples: loads of 16 bytes.
        columns = known_multiple_of_8(columns)
        start = known_multiple_of_8(start)
        if blocks == 1:
            _add_to_segment(
                y_rows, h_rows, plane_stride, is_token, b, scale, first_tile, size, start, y_columns, rank, blocks,
                columns, index, width, n_sites, PLANES, PARTS, BLOCK_T, BLOCK_R, BLOCK_O, REPEAT, False, OVERLAP,
            )  # fmt: skip
        else:
            _add_to_segment(
                y_rows, h_rows, plane_stride, is_token, b, scale, first_tile, size, start, y_columns, rank, blocks,
                columns, index, width, n_sites, PLANES, PARTS, BLOCK_T, BLOCK_R, BLOCK_O, REPEAT, True, OVERLAP,
            )  # fmt: skip
    else:
        PER_TILE: tl.constexpr = BLOCK_O // NARROW
        _add_to_segment(
            y_rows, h_rows, plane_stride, is_token, b, scale, first_tile * PER_TILE, size, start, y_columns, rank,
            blocks, columns, index, width, n_sites,
            PLANES, PARTS, BLOCK_T, 16, NARROW, REPEAT * PER_TILE, True, OVERLAP,
        )  # fmt: skip
