"""y += scale * (B (A x)) in one launch, for few tokens: every program computes the h that its columns of y need.

A is then read once for each column tile of y instead of once; after the first time it comes from the L2 cache. With the
narrow local ranks of a tensor-parallel rank that costs less than a second launch and a round trip of h through memory.
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
    site_and_tile,
    slot_row,
)

_VARYING = ["num_slots", "tiles0", "tiles1", "site0", "site1", "site2"]
"""Numbers that differ from layer to layer: one compiled kernel serves all of them."""


@triton.jit
def _shrink_rows(x_row, a, rows, is_row, columns, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_R] products of A's rows with x; one reduction over threads at the end."""
    total = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_range = k < columns
        value = tl.load(x_row + k, mask=in_range, other=0.0).to(tl.float32)
        factor = tl.load(a + rows[:, None] * columns + k[None, :], mask=is_row[:, None] & in_range[None, :], other=0.0)
        total += factor.to(tl.float32) * value[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _apply_rows(
    x_row, a, b, o, is_column, first_row, height, a_columns, b_columns,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """[BLOCK_O] sums over the rows first_row..first_row + height of both factors."""
    total = tl.zeros([BLOCK_O], dtype=tl.float32)
    for first in range(0, height, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        is_row = r < height
        rows = first_row + r
        # B does not wait for h: its loads are under way while A is read.
        factor = tl.load(
            b + rows[:, None] * b_columns + o[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0
        )
        h = _shrink_rows(x_row, a, rows, is_row, a_columns, BLOCK_R, BLOCK_K)
        total += tl.sum(h[:, None] * factor.to(tl.float32), axis=0)
    return total


@triton.jit
def _apply_block(
    x_row, a, b, o, is_column, first_row, height, a_columns, b_columns,
    MAX_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """`_apply_rows` with as many rows at once as this slot has: narrow ranks do not pay for wide ones."""
    if (height <= 2) | (MAX_R == 2):
        total = _apply_rows(
            x_row, a, b, o, is_column, first_row, height, a_columns, b_columns, 2, BLOCK_K, BLOCK_O
        )  # fmt: skip
    elif (height <= 4) | (MAX_R == 4):
        total = _apply_rows(
            x_row, a, b, o, is_column, first_row, height, a_columns, b_columns, 4, BLOCK_K, BLOCK_O
        )  # fmt: skip
    else:
        total = _apply_rows(
            x_row, a, b, o, is_column, first_row, height, a_columns, b_columns, MAX_R, BLOCK_K, BLOCK_O
        )  # fmt: skip
    return total


@triton.jit
def _apply_blocks(
    x_row, a, b, o, size, is_column, tile, rank, a_blocks, b_blocks, a_columns, b_columns,
    MAX_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The same for packed factors: a block of A sees its part of x, a block of B writes its part of y."""
    total = tl.zeros([BLOCK_O], dtype=tl.float32)
    if b_blocks > 1:
        height = rank // b_blocks
        last = tl.minimum((tile + 1) * BLOCK_O, size) - 1
        for block in range(tile * BLOCK_O // b_columns, last // b_columns + 1):
            own = is_column & (o // b_columns == block)
            total += _apply_block(
                x_row, a, b, o - block * b_columns, own, block * height, height, a_columns, b_columns,
                MAX_R, BLOCK_K, BLOCK_O,
            )  # fmt: skip
    else:
        height = rank // a_blocks
        for block in range(0, a_blocks):
            total += _apply_block(
                x_row + block * a_columns, a, b, o, is_column, block * height, height, a_columns, b_columns,
                MAX_R, BLOCK_K, BLOCK_O,
            )  # fmt: skip
    return total


@triton.jit(do_not_specialize=_VARYING)
def apply_tokens(
    x, y, pool, slots, scales, token_slot,
    x_stride, in_features, y_stride, y_columns, num_slots, tiles0, tiles1,
    site0, site1, site2, out0, out1, out2,
    MAX_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, column tiles of all sites). x [T, D], y [T, O], rows ``*_stride`` apart.

    OVERLAP: launched before the kernel ahead of it has ended (programmatic dependent launch); it waits before it reads
    what that kernel may still write, which is x and y.
    """
    token = tl.program_id(0)
    chosen = tl.load(token_slot + token)
    slot = tl.maximum(chosen, 0)
    index, tile = site_and_tile(tl.program_id(1), tiles0, tiles1)
    site = choose(index, site0, site1, site2)
    size = choose(index, out0, out1, out2)
    row = slot_row(slots, site, slot, num_slots)
    rank = tl.load(row + A_RANK).to(tl.int32)
    a_blocks = tl.load(row + A_BLOCKS).to(tl.int32)
    b_blocks = tl.load(row + B_BLOCKS).to(tl.int32)
    a = pool + tl.multiple_of(tl.load(row + A_OFFSET), 16)
    b = pool + tl.multiple_of(tl.load(row + B_OFFSET), 16)
    start = choose(index, 0, out0, out0 + out1) + tl.load(row + OUT_START).to(tl.int32)
    scale = tl.load(scales + site.to(tl.int64) * num_slots + slot)
    if OVERLAP:
        # Also where there is nothing to do: who waits for this kernel waits for the one ahead of it too.
        tl.extra.cuda.gdc_wait()
    if (chosen < 0) | (rank == 0):
        return
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    is_column = (o < size) & (start + o < y_columns)
    x_row = x + token.to(tl.int64) * x_stride
    a_columns, b_columns = in_features // a_blocks, size // b_blocks
    target = y + token.to(tl.int64) * y_stride + start + o
    before = tl.load(target, mask=is_column, other=0.0).to(tl.float32)
    if a_blocks * b_blocks > 1:
        total = _apply_blocks(
            x_row, a, b, o, size, is_column, tile, rank, a_blocks, b_blocks, a_columns, b_columns,
            MAX_R, BLOCK_K, BLOCK_O,
        )  # fmt: skip
    elif (a_columns % 8 == 0) & (b_columns % 8 == 0):
        # Known to be multiples: loads of 16 bytes.
        total = _apply_block(
            x_row, a, b, o, is_column, 0, rank, tl.multiple_of(a_columns, 8), tl.multiple_of(b_columns, 8),
            MAX_R, BLOCK_K, BLOCK_O,
        )  # fmt: skip
    else:
        total = _apply_block(
            x_row, a, b, o, is_column, 0, rank, a_columns, b_columns, MAX_R, BLOCK_K, BLOCK_O
        )  # fmt: skip
    tl.store(target, (before + scale * total).to(y.dtype.element_ty), mask=is_column)
