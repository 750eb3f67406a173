"""y += scale * (B (A x)) in one launch, for few tokens: every program computes the h that its columns of y need.

A is then read once for each column tile of y instead of once; after the first time it comes from the L2 cache. With the
narrow local ranks of a tensor-parallel rank that costs less than a second launch and a round trip of h through memory.

Such a launch lasts about as long as its instructions take one after the other, so they are few: sizes are constants,
and only packed factors divide.
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.fields import (
    A_BLOCKS,
    A_OFFSET,
    A_RANK,
    B_BLOCKS,
    B_OFFSET,
    OUT_START,
    choose,
    known_multiple_of_8,
    let_next_kernel_start,
    site_and_tile,
    slot_row,
    wait_for_kernel_ahead,
)

_VARYING = ["num_slots", "site0", "site1", "site2"]
"""Numbers that differ from layer to layer: one compiled kernel serves all of them."""


@triton.jit
def _add_narrow(
    x_row, y_row, a, b, scale, tile, size, start, y_columns, rank,
    IN: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add B (A x) to the columns of one tile, with all of A and the tile's part of B held at once: no loop."""
    row = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, BLOCK_K)
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row = row < rank
    # Neither A nor B waits for the kernel ahead.
    factor_b = tl.load(b + row * size + o[None, :], mask=is_row & (o < size)[None, :], other=0.0)
    factor_a = tl.load(
        a + row * IN + k[None, :], mask=is_row if BLOCK_K == IN else is_row & (k < IN)[None, :], other=0.0
    )
    wait_for_kernel_ahead(OVERLAP)
    let_next_kernel_start(OVERLAP)
    is_column = (o < size) & (start + o < y_columns)
    before = tl.load(y_row + start + o, mask=is_column, other=0.0)
    value = tl.load(x_row + k) if BLOCK_K == IN else tl.load(x_row + k, mask=k < IN, other=0.0)
    h = tl.sum(factor_a.to(tl.float32) * value.to(tl.float32)[None, :], axis=1)
    total = tl.sum(h[:, None] * factor_b.to(tl.float32), axis=0)
    tl.store(y_row + start + o, (before.to(tl.float32) + scale * total).to(before.dtype), mask=is_column)


@triton.jit
def _h_of_rows(x_part, a_rows, is_row, columns, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[ROWS] products of rows of A, which begin at ``a_rows``, with the part of x that they see."""
    total = tl.zeros([ROWS, BLOCK_K], dtype=tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        factor = tl.load(a_rows[:, None] + k[None, :], mask=is_row[:, None] & (k < columns)[None, :], other=0.0)
        value = tl.load(x_part + k, mask=k < columns, other=0.0)
        total += factor.to(tl.float32) * value.to(tl.float32)[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _add_by_blocks(
    x_row, y_row, a, b, scale, tile, size, start, y_columns, rank, a_blocks, a_columns, b_blocks, b_columns,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The same for factors of any rank and packing, ROWS rows of a block at a time.

    A block of A sees its part of x, a block of B writes its part of y; only one of the two has several.
    """
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    is_column = (o < size) & (start + o < y_columns)
    before = tl.load(y_row + start + o, mask=is_column, other=0.0)
    height = rank // (a_blocks * b_blocks)
    first_block, last_block = 0, a_blocks - 1
    if b_blocks > 1:
        first_block = tile * BLOCK_O // b_columns
        last_block = (tl.minimum((tile + 1) * BLOCK_O, size) - 1) // b_columns
    total = tl.zeros([BLOCK_O], dtype=tl.float32)
    for block in range(first_block, last_block + 1):
        x_part = x_row + tl.where(a_blocks > 1, block * a_columns, 0)
        within = o - tl.where(b_blocks > 1, block * b_columns, 0)
        own = is_column & (within >= 0) & (within < b_columns)
        for first in range(0, height, ROWS):
            in_block = first + tl.arange(0, ROWS)
            is_row = in_block < height
            row = block * height + in_block
            factor = tl.load(
                b + row[:, None] * b_columns + within[None, :], mask=is_row[:, None] & own[None, :], other=0.0
            )
            h = _h_of_rows(x_part, a + row * a_columns, is_row, a_columns, ROWS, BLOCK_K)
            total += tl.sum(h[:, None] * factor.to(tl.float32), axis=0)
    tl.store(y_row + start + o, (before.to(tl.float32) + scale * total).to(before.dtype), mask=is_column)


@triton.jit(do_not_specialize=_VARYING)
def apply_tokens(
    x, y, pool, slots, scales, token_slot,
    x_stride, y_stride, y_columns, num_slots, site0, site1, site2,
    IN: tl.constexpr, OUT0: tl.constexpr, OUT1: tl.constexpr, OUT2: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, column tiles of all sites). x [T, IN], y [T, O], rows ``*_stride`` apart.

    OVERLAP: the table, the pool and the tokens' slots are read before the kernel ahead in the stream has ended; x and
    y, which it may still write, after.
    """
    token = tl.program_id(0)
    chosen = tl.load(token_slot + token)
    slot = tl.maximum(chosen, 0)
    index, tile = site_and_tile(tl.program_id(1), tl.cdiv(OUT0, BLOCK_O), tl.cdiv(OUT1, BLOCK_O))
    site = choose(index, site0, site1, site2)
    size = choose(index, OUT0, OUT1, OUT2)
    fields = slot_row(slots, site, slot, num_slots)
    rank = tl.load(fields + A_RANK).to(tl.int32)
    a_blocks = tl.load(fields + A_BLOCKS).to(tl.int32)
    b_blocks = tl.load(fields + B_BLOCKS).to(tl.int32)
    a_offset = tl.multiple_of(tl.load(fields + A_OFFSET), 16)
    b_offset = tl.multiple_of(tl.load(fields + B_OFFSET), 16)
    start = choose(index, 0, OUT0, OUT0 + OUT1) + tl.load(fields + OUT_START).to(tl.int32)
    scale = tl.load(scales + site.to(tl.int64) * num_slots + slot)
    # Offsets are never negative: named here so that their loads are not put off behind the branch.
    if (chosen < 0) | (rank == 0) | ((a_offset | b_offset) < 0):
        wait_for_kernel_ahead(OVERLAP)
        return
    a, b = pool + a_offset, pool + b_offset
    x_row = x + token.to(tl.int64) * x_stride
    y_row = y + token.to(tl.int64) * y_stride
    IS_ALIGNED: tl.constexpr = (IN % 8 == 0) and (OUT0 % 8 == 0) and (OUT1 % 8 == 0) and (OUT2 % 8 == 0)
    if IS_ALIGNED & (rank <= ROWS) & (a_blocks * b_blocks == 1) & (start % 8 == 0):
        # Known to be multiples of 8: loads of 16 bytes. As many rows at once as this slot has.
        start = known_multiple_of_8(start)
        size = known_multiple_of_8(size)
        if (rank <= 2) | (ROWS == 2):
            _add_narrow(
                x_row, y_row, a, b, scale, tile, size, start, y_columns, rank,
                IN, 2, BLOCK_K, BLOCK_O, OVERLAP,
            )  # fmt: skip
        elif (rank <= 4) | (ROWS == 4):
            _add_narrow(
                x_row, y_row, a, b, scale, tile, size, start, y_columns, rank,
                IN, 4, BLOCK_K, BLOCK_O, OVERLAP,
            )  # fmt: skip
        else:
            _add_narrow(
                x_row, y_row, a, b, scale, tile, size, start, y_columns, rank,
                IN, ROWS, BLOCK_K, BLOCK_O, OVERLAP,
            )  # fmt: skip
    else:
        wait_for_kernel_ahead(OVERLAP)
        let_next_kernel_start(OVERLAP)
        a_columns, b_columns = IN // a_blocks, size // b_blocks
        if (a_columns % 8 == 0) & (b_columns % 8 == 0) & (start % 8 == 0):
            _add_by_blocks(
                x_row, y_row, a, b, scale, tile, size, known_multiple_of_8(start), y_columns, rank,
                a_blocks, known_multiple_of_8(a_columns), b_blocks, known_multiple_of_8(b_columns),
                4 if ROWS > 4 else 2, BLOCK_O, BLOCK_O,
            )  # fmt: skip
        else:
            # Seldom used, and must not cost the others registers: a column and an element of A for each thread.
            PART: tl.constexpr = BLOCK_O // 8
            for part in range(8):
                _add_by_blocks(
                    x_row, y_row, a, b, scale, tile * 8 + part, size, start, y_columns, rank,
                    a_blocks, a_columns, b_blocks, b_columns, 1, PART, PART,
                )  # fmt: skip
