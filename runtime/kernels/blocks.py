"""Factors of a slot at a tile of columns, for programs that read their rows before they wait for another kernel.

A tile of columns seldom meets more than two blocks of a packed factor, and each column sees the rows of its own block
alone: so as many rows are held as a block has, and where they lie is a number for each column.
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.fields import (
    B_BLOCKS,
    B_OFFSET,
    B_RANK,
    LINE,
    OUT_START,
    ask_for,
    h_offset,
    known_multiple_of_8,
    load_h,
    slot_row,
)


@triton.jit
def b_of_slot(pool, slots, scales, site, slot, num_slots):
    """A slot's B at a site: (b, scale, rank, 0 without adapter, blocks, first column that it writes)."""
    fields = slot_row(slots, site, tl.maximum(slot, 0), num_slots)
    b = pool + tl.multiple_of(tl.load(fields + B_OFFSET), 16)
    scale = tl.load(scales + site.to(tl.int64) * num_slots + tl.maximum(slot, 0))
    rank = tl.where(slot < 0, 0, tl.load(fields + B_RANK).to(tl.int32))
    blocks = tl.maximum(tl.load(fields + B_BLOCKS).to(tl.int32), 1)
    return b, scale, rank, blocks, tl.load(fields + OUT_START).to(tl.int32)


@triton.jit
def meets_two_blocks(first, last, columns, start):
    """Whether columns first..last meet at most two blocks of so many columns, all in multiples of 8."""
    return (columns % 8 == 0) & (start == 0) & (last // columns - first // columns <= 1)


@triton.jit
def elements_of_blocks(o, block, columns, height):
    """(columns of the second block that a tile meets, elements in the first row of each column's block); both [O]."""
    begin = known_multiple_of_8(block * columns)
    # The same column of a row lies height rows further in the next block, which begins one row's length further.
    jump = known_multiple_of_8((height - 1) * columns)
    is_second = o >= begin + known_multiple_of_8(columns)
    at = o + known_multiple_of_8(block * jump)
    return is_second, tl.where(is_second, at + jump, at)


@triton.jit
def load_rows_of_blocks(factor, elements, inside, row, height, columns):
    """Rows ``row`` of each column's block, [R, O]."""
    mask = (row < height)[:, None] & inside[None, :]
    return tl.load(factor + row[:, None] * known_multiple_of_8(columns) + elements[None, :], mask=mask, other=0.0)


@triton.jit
def first_rows_of_blocks(factor, o, inside, first, size, rank, blocks, is_plain, ROWS: tl.constexpr):
    """The first ROWS rows of each column's block, [ROWS, O]: read before any kernel is waited for."""
    columns, height = size // blocks, rank // blocks
    _, elements = elements_of_blocks(o, first // columns, columns, height)
    return load_rows_of_blocks(factor, elements, inside, tl.arange(0, ROWS), tl.where(is_plain, height, 0), columns)


@triton.jit
def ask_for_more_rows(
    factor, first, last, size, rank, blocks, is_plain, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Let the cache fetch what `first_rows_of_blocks` has left of columns first..last, in a tile of BLOCK.

    Where kernels overlap: it is fetched while the one ahead is waited for.
    """
    if OVERLAP:
        columns, height = size // blocks, rank // blocks
        o = first + LINE * tl.arange(0, triton.cdiv(BLOCK, LINE))
        _, elements = elements_of_blocks(o, first // columns, columns, height)
        rows = tl.where(is_plain, height, 0)
        for start in range(ROWS, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            at = factor + row[:, None] * known_multiple_of_8(columns) + elements[None, :]
            ask_for(at, (row < rows)[:, None] & (o <= last)[None, :])


@triton.jit
def h_of_two_blocks(
    h, plane_stride, row, block, height, rank, index, width, n_sites, PLANES: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """A token's h at rows ``row`` of a block and of the next one, [R] each, for one of ``n_sites`` sites."""
    own = block * height + row
    first = load_h(h + h_offset(own, rank, index, width, n_sites, PARTS), plane_stride, row < height, PLANES)
    following = own + height
    is_row = (row < height) & (following < rank)
    return first, load_h(h + h_offset(following, rank, index, width, n_sites, PARTS), plane_stride, is_row, PLANES)


@triton.jit
def sum_of_rows(factor, is_second, first, second):
    """Rows of B [R, O] times h of each column's block, summed: [O]. ``first`` and ``second``: h of two blocks, [R]."""
    value = tl.where(is_second[None, :], second[:, None], first[:, None])
    return tl.sum(value * factor.to(tl.float32), axis=0)


@triton.jit
def b_h_by_row(
    b, o, inside, start, columns, height, rank, h, plane_stride, index, width, n_sites,
    PLANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """B h at columns ``o``, [O], for any sizes and blocks: seldom, and must not cost the others registers.

    A row at a time; h as for `h_of_two_blocks`, and the first column that B writes is ``start``.
    """
    total = tl.zeros(o.shape, dtype=tl.float32)
    one = tl.arange(0, 1)
    for j in range(rank):
        within = o - start - j // height * columns
        factor = tl.load(b + j * columns + within, mask=inside & (within >= 0) & (within < columns), other=0.0)
        value = load_h(h + h_offset(j + one, rank, index, width, n_sites, PARTS), plane_stride, one == 0, PLANES)
        total += tl.sum(value, axis=0) * factor.to(tl.float32)
    return total
