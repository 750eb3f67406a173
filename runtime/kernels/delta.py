"""What LoRA adds to a product of few tokens, scale * (B h), beside the product; who reads the product adds it.

Each program owns some columns of one token and writes all of them, zeros where the token's slot adds nothing. h as in
`expand.py`: [PLANES, T, PARTS, n, width]. `delta_mixed.py` is the same for tokens grouped by slot.
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.expand import b_h_of_token
from bdlora_compile.runtime.kernels.fields import (
    B_BLOCKS,
    B_OFFSET,
    B_RANK,
    OUT_START,
    VARYING,
    choose,
    known_multiple_of_8,
    rows_of_tile,
    site_and_tile,
    slot_row,
    wait_for_kernel_ahead,
)


@triton.jit
def factor_of(pool, slots, scales, site, chosen, num_slots):
    """B of a token's slot at a site: rank (0 without a slot), blocks, where it lies, first column, and the scale."""
    slot = tl.maximum(chosen, 0)
    fields = slot_row(slots, site, slot, num_slots)
    rank = tl.where(chosen < 0, 0, tl.load(fields + B_RANK).to(tl.int32))
    blocks = tl.maximum(tl.load(fields + B_BLOCKS).to(tl.int32), 1)
    b = pool + tl.multiple_of(tl.load(fields + B_OFFSET), 16)
    start = tl.load(fields + OUT_START).to(tl.int32)
    return rank, blocks, b, start, tl.load(scales + site.to(tl.int64) * num_slots + slot)


@triton.jit
def rows_that_write(tile, size, columns, height, start, rank, BLOCK_O: tl.constexpr):
    """(first, behind the last) row of B that writes a tile's columns; a tile that lies elsewhere in B may meet any."""
    begin, end = rows_of_tile(tile, size, columns, height, BLOCK_O)
    return tl.where(start == 0, begin, 0), tl.where(start == 0, tl.minimum(end, rank), rank)


@triton.jit
def write_delta_of_token(
    row_of_site, h_token, plane_stride, b, start, scale, tile, size, room, rank, blocks, index, width, n_sites,
    PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A tile of a token's columns of one site, whose ``room`` columns begin at ``row_of_site``."""
    columns, height = size // blocks, tl.maximum(rank // blocks, 1)
    column = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros([BLOCK_O], dtype=tl.float32)
    begin, end = rows_that_write(tile, size, columns, height, start, rank, BLOCK_O)
    if (columns % 8 == 0) & (start % 8 == 0):
        # Known to be multiples: loads of 16 bytes.
        columns = known_multiple_of_8(columns)
        o = column - known_multiple_of_8(start)
        is_column = (o >= 0) & (o < size)
        if blocks == 1:
            total += b_h_of_token(
                h_token, plane_stride, b, o, is_column, begin, end, rank, height, columns, index, width, n_sites,
                PLANES, PARTS, BLOCK_R, False, OVERLAP, OVERLAP,
            )  # fmt: skip
        else:
            # A tile meets few of the blocks, whose rows are few.
            total += b_h_of_token(
                h_token, plane_stride, b, o, is_column, begin, end, rank, height, columns, index, width, n_sites,
                PLANES, PARTS, (BLOCK_R + 1) // 2, True, OVERLAP, OVERLAP,
            )  # fmt: skip
    else:
        # Seldom, and must not cost the others registers.
        o = column - start
        total += b_h_of_token(
            h_token, plane_stride, b, o, (o >= 0) & (o < size), begin, end, rank, height, columns, index, width,
            n_sites, PLANES, PARTS, 1, True, OVERLAP, OVERLAP,
        )  # fmt: skip
    # Also where no row is read: what lay in this memory may still be read.
    wait_for_kernel_ahead(OVERLAP)
    tl.store(row_of_site + column, (scale * total).to(row_of_site.dtype.element_ty), mask=column < room)


@triton.jit(do_not_specialize=VARYING)
def delta_tokens(
    delta, h, pool, slots, scales, token_slot, num_slots, tokens, width, n_sites, site0, site1, site2,
    OUT0: tl.constexpr, OUT1: tl.constexpr, OUT2: tl.constexpr, ROOM0: tl.constexpr, ROOM1: tl.constexpr,
    ROOM2: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, column tiles of all sites). delta [at least T, the sum of ROOM*]: ROOM columns for each site.

    OUT*: columns that B writes, from the slot's OUT_START on. OVERLAP: the pool, the table and the tokens' slots are
    read before the kernel ahead in the stream has ended, which writes h.
    """
    token = tl.program_id(0).to(tl.int64)
    chosen = tl.load(token_slot + token)
    index, tile = site_and_tile(tl.program_id(1), tl.cdiv(ROOM0, BLOCK_O), tl.cdiv(ROOM1, BLOCK_O))
    site, size = choose(index, site0, site1, site2), choose(index, OUT0, OUT1, OUT2)
    rank, blocks, b, start, scale = factor_of(pool, slots, scales, site, chosen, num_slots)
    row_size = PARTS * n_sites * width
    first_of_site, room = choose(index, 0, ROOM0, ROOM0 + ROOM1), choose(index, ROOM0, ROOM1, ROOM2)
    write_delta_of_token(
        delta + token * (ROOM0 + ROOM1 + ROOM2) + first_of_site, h + token * row_size, tokens.to(tl.int64) * row_size,
        b, start, scale, tile, size, room, rank, blocks, index, width, n_sites,
        PLANES, PARTS, BLOCK_R, BLOCK_O, OVERLAP,
    )  # fmt: skip
