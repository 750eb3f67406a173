"""y += scale * (B h), in place: each program owns some columns of y for one token or one segment.

h is read as [PLANES, T, PARTS, n, width]: planes are summed (splits of the shrink), parts lie side by side (the ranks
of a gather, each with an equal share of a slot's rank at the left).
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.fields import B_BLOCKS, B_OFFSET, B_RANK, OUT_START, choose, site_and_tile, slot_row

_VARYING = ["num_slots", "tokens", "tiles0", "tiles1", "site0", "site1", "site2"]
"""Numbers that differ from layer to layer or from call to call: one compiled kernel serves all of them."""


@triton.jit
def _h_offset(j, rank, index, width, N_SITES: tl.constexpr, PARTS: tl.constexpr):
    """Where element j of a slot's rank lies in a token's row of h."""
    if PARTS == 1:
        return index * width + j
    share = rank // PARTS
    return (j // share * N_SITES + index) * width + j % share


@triton.jit
def _columns_of_token(
    h_token, plane_stride, b, o, is_column, rank, height, columns, index, width,
    N_SITES: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """[BLOCK_O] sums over the ranks of the block that each column lies in."""
    total = tl.zeros([BLOCK_O], dtype=tl.float32)
    block = o // columns
    within = o - block * columns
    for first in range(0, height, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        rows = block[None, :] * height + r[:, None]
        inside = (r < height)[:, None] & is_column[None, :]
        value = tl.zeros([BLOCK_R, BLOCK_O], dtype=tl.float32)
        at = h_token + _h_offset(rows, rank, index, width, N_SITES, PARTS)
        for plane in tl.static_range(PLANES):
            value += tl.load(at + plane * plane_stride, mask=inside, other=0.0)
        factor = tl.load(b + rows * columns + within[None, :], mask=inside, other=0.0)
        total += tl.sum(value * factor.to(tl.float32), axis=0)
    return total


@triton.jit
def _dense_columns_of_token(
    h_token, plane_stride, b, o, is_column, rank, columns, index, width,
    N_SITES: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The same for one block: every column reads the same h."""
    total = tl.zeros([BLOCK_O], dtype=tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        is_row = r < rank
        factor = tl.load(b + r[:, None] * columns + o[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
        value = tl.zeros([BLOCK_R], dtype=tl.float32)
        at = h_token + _h_offset(r, rank, index, width, N_SITES, PARTS)
        for plane in tl.static_range(PLANES):
            value += tl.load(at + plane * plane_stride, mask=is_row, other=0.0)
        total += tl.sum(value[:, None] * factor.to(tl.float32), axis=0)
    return total


@triton.jit(do_not_specialize=_VARYING)
def expand_tokens(
    y, h, pool, slots, scales, token_slot,
    y_stride, y_columns, num_slots, tokens, width, tiles0, tiles1,
    site0, site1, site2, out0, out1, out2,
    N_SITES: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, column tiles of all sites). y [T, O] with rows ``y_stride`` apart."""
    token = tl.program_id(0)
    slot = tl.load(token_slot + token)
    if slot < 0:
        return
    index, tile = site_and_tile(tl.program_id(1), tiles0, tiles1)
    site = choose(index, site0, site1, site2)
    size = choose(index, out0, out1, out2)
    row = slot_row(slots, site, slot, num_slots)
    rank = tl.load(row + B_RANK).to(tl.int32)
    if rank == 0:
        return
    blocks = tl.load(row + B_BLOCKS).to(tl.int32)
    b = pool + tl.multiple_of(tl.load(row + B_OFFSET), 16)
    start = choose(index, 0, out0, out0 + out1) + tl.load(row + OUT_START).to(tl.int32)
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    is_column = (o < size) & (start + o < y_columns)
    columns = size // blocks
    row_size = PARTS * N_SITES * width
    h_token = h + token.to(tl.int64) * row_size
    plane_stride = tokens.to(tl.int64) * row_size
    if blocks > 1:
        total = _columns_of_token(
            h_token, plane_stride, b, o, is_column, rank, rank // blocks, columns, index, width,
            N_SITES, PLANES, PARTS, BLOCK_R, BLOCK_O,
        )  # fmt: skip
    elif columns % 8 == 0:
        total = _dense_columns_of_token(
            h_token, plane_stride, b, o, is_column, rank, tl.multiple_of(columns, 8), index, width,
            N_SITES, PLANES, PARTS, BLOCK_R, BLOCK_O,
        )  # fmt: skip
    else:
        total = _dense_columns_of_token(
            h_token, plane_stride, b, o, is_column, rank, columns, index, width,
            N_SITES, PLANES, PARTS, BLOCK_R, BLOCK_O,
        )  # fmt: skip
    scale = tl.load(scales + site.to(tl.int64) * num_slots + slot)
    target = y + token.to(tl.int64) * y_stride + start + o
    before = tl.load(target, mask=is_column, other=0.0).to(tl.float32)
    tl.store(target, (before + scale * total).to(y.dtype.element_ty), mask=is_column)


@triton.jit(do_not_specialize=_VARYING)
def expand_segments(
    y, h, pool, slots, scales, order, segments,
    y_stride, y_columns, num_slots, tokens, width, tiles0, tiles1,
    site0, site1, site2, out0, out1, out2,
    N_SITES: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Grid (segments, column tiles of all sites)."""
    segment = tl.program_id(0)
    count = tl.load(segments + segment * 3 + 2)
    if count == 0:
        return
    slot = tl.load(segments + segment * 3)
    first_token = tl.load(segments + segment * 3 + 1)
    index, tile = site_and_tile(tl.program_id(1), tiles0, tiles1)
    site = choose(index, site0, site1, site2)
    size = choose(index, out0, out1, out2)
    row = slot_row(slots, site, slot, num_slots)
    rank = tl.load(row + B_RANK).to(tl.int32)
    if rank == 0:
        return
    blocks = tl.load(row + B_BLOCKS).to(tl.int32)
    b = pool + tl.multiple_of(tl.load(row + B_OFFSET), 16)
    start = choose(index, 0, out0, out0 + out1) + tl.load(row + OUT_START).to(tl.int32)
    columns = size // blocks
    height = rank // blocks
    t = tl.arange(0, BLOCK_T)
    is_token = t < count
    token = tl.load(order + first_token + t, mask=is_token, other=0).to(tl.int64)
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    is_column = (o < size) & (start + o < y_columns)
    row_size = PARTS * N_SITES * width
    plane_stride = tokens.to(tl.int64) * row_size
    total = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    last = tl.minimum((tile + 1) * BLOCK_O, size) - 1
    for block in range(tile * BLOCK_O // columns, last // columns + 1):
        own = is_column & (o // columns == block)
        for first in range(0, height, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            is_row = r < height
            rows = block * height + r
            at = h + token[:, None] * row_size + _h_offset(rows, rank, index, width, N_SITES, PARTS)[None, :]
            value = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
            for plane in tl.static_range(PLANES):
                value += tl.load(at + plane * plane_stride, mask=is_token[:, None] & is_row[None, :], other=0.0)
            factor = tl.load(
                b + rows[:, None] * columns + (o - block * columns)[None, :],
                mask=is_row[:, None] & own[None, :],
                other=0.0,
            )
            total = tl.dot(value.to(factor.dtype), factor, total)
    scale = tl.load(scales + site.to(tl.int64) * num_slots + slot)
    target = y + token[:, None] * y_stride + (start + o)[None, :]
    mask = is_token[:, None] & is_column[None, :]
    before = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (before + scale * total).to(y.dtype.element_ty), mask=mask)
