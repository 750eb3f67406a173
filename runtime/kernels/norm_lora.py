"""LoRA of the product ahead of an all-reduce and norm: B (A u), which `norm.py` adds before it sums over the ranks.

A program has all columns of a token and makes all of its h, so that neither factor needs a launch of its own. Or h is
given, by an earlier kernel or a sum over the ranks: then B alone is read, which may write a part of the columns.
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.blocks import b_h_by_row, b_of_slot
from bdlora_compile.runtime.kernels.fields import (
    A_BLOCKS,
    A_OFFSET,
    LINE,
    ask_for,
    h_offset,
    known_multiple_of_8,
    load_b,
    load_h,
    slot_row,
)

NARROW: tl.constexpr = tl.constexpr(256)
"""Columns that a program reads at once where sizes are no multiples of 8: seldom, and must not cost registers."""


@triton.jit
def product_of_slot(pool, slots, scales, site, slot, num_slots, IN: tl.constexpr, COLUMNS: tl.constexpr):
    """A slot's factors at the site of a product [COLUMNS, IN].

    Returns:
        a, b, scale, rank of both (0 without adapter); rows and columns of a block of A; blocks of B and the first
        column that B writes; and whether B is one block from the first column on, and all sizes are multiples of 8.
    """
    fields = slot_row(slots, site, tl.maximum(slot, 0), num_slots)
    a = pool + tl.multiple_of(tl.load(fields + A_OFFSET), 16)
    b, scale, rank, b_blocks, start = b_of_slot(pool, slots, scales, site, slot, num_slots)
    a_blocks = tl.maximum(tl.load(fields + A_BLOCKS).to(tl.int32), 1)
    height, columns = tl.maximum(rank // a_blocks, 1), IN // a_blocks
    is_plain = (columns % 8 == 0) & (COLUMNS % 8 == 0) & (b_blocks == 1) & (start == 0)
    return a, b, scale, rank, height, columns, b_blocks, start, is_plain


@triton.jit
def first_rows_of_product(product, column, inside, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """(the first rows and columns of A, the first rows of B); zeros where the product is not plain."""
    a, b, _, rank, _, columns, _, _, is_plain = product
    row, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    end = tl.where(is_plain, rank, 0)
    columns = known_multiple_of_8(columns)
    a_rows = load_b(a, row, row < end, k, k < columns, 1, columns, False)
    return a_rows, load_b(b, row, row < end, column, inside, 1, COLUMNS, False)


@triton.jit
def ask_for_more_of_product(
    product, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Let the cache fetch what `first_rows_of_product` has left of a plain product, of B in all BLOCK columns.

    Where kernels overlap: it is fetched while the one ahead is waited for.
    """
    if OVERLAP:
        a, b, _, rank, _, columns, _, _, is_plain = product
        row, end = tl.arange(0, ROWS), tl.where(is_plain, rank, 0)
        k, column = LINE * tl.arange(0, triton.cdiv(BLOCK_K, LINE)), LINE * tl.arange(0, triton.cdiv(BLOCK, LINE))
        for first in range(0, end, ROWS):
            own = first + row
            for start in range(tl.where(first == 0, BLOCK_K, 0), columns, BLOCK_K):
                at = a + own[:, None] * columns + (start + k)[None, :]
                ask_for(at, (own < end)[:, None] & (start + k < columns)[None, :])
            if first > 0:
                at = b + own[:, None] * COLUMNS + column[None, :]
                ask_for(at, (own < end)[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def _h_of_rows(factor, a, u, row, end, height, columns, BLOCK_K: tl.constexpr):
    """A u of some rows, [ROWS]; ``factor`` holds their first BLOCK_K columns. A row sees the columns of its block."""
    k = tl.arange(0, BLOCK_K)
    u_rows = u + known_multiple_of_8(row // height * columns)[:, None]
    is_row = (row < end)[:, None]
    value = tl.load(u_rows + k[None, :], mask=is_row & (k < columns)[None, :], other=0.0)
    total = factor.to(tl.float32) * value.to(tl.float32)
    for start in range(BLOCK_K, columns, BLOCK_K):
        within = start + k
        more = load_b(a, row, row < end, within, within < columns, 1, columns, False)
        value = tl.load(u_rows + within[None, :], mask=is_row & (within < columns)[None, :], other=0.0)
        total += more.to(tl.float32) * value.to(tl.float32)
    return tl.sum(total, axis=1)


@triton.jit
def _added_by_rows(product, u, column, inside, COLUMNS: tl.constexpr):
    """B (A u) for any sizes and blocks, a row after the other: seldom, and must not cost registers."""
    a, b, _, rank, height, columns, b_blocks, start, _ = product
    total = tl.zeros(column.shape, dtype=tl.float32)
    b_columns, b_height = COLUMNS // b_blocks, tl.maximum(rank // b_blocks, 1)
    for j in range(rank):
        products = tl.zeros([NARROW], dtype=tl.float32)
        for first in range(0, columns, NARROW):
            k = first + tl.arange(0, NARROW)
            factor = tl.load(a + j * columns + k, mask=k < columns, other=0.0)
            value = tl.load(u + j // height * columns + k, mask=k < columns, other=0.0)
            products += factor.to(tl.float32) * value.to(tl.float32)
        own = column - start - j // b_height * b_columns
        factor = tl.load(b + j * b_columns + own, mask=inside & (own >= 0) & (own < b_columns), other=0.0)
        total += tl.sum(products, axis=0) * factor.to(tl.float32)
    return total


@triton.jit
def lora_of_product(
    product, first_rows, u, column, inside, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """scale * (B (A u)) at some columns, in float32.

    Args:
        product: from `product_of_slot`. first_rows: from `first_rows_of_product`. u: the row of the product's input.
    """
    a, b, scale, rank, height, columns, _, _, is_plain = product
    total = tl.zeros(column.shape, dtype=tl.float32)
    if is_plain:
        columns = known_multiple_of_8(columns)
        row, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
        a_rows, b_rows = first_rows
        h = _h_of_rows(a_rows, a, u, row, rank, height, columns, BLOCK_K)
        total += tl.sum(h[:, None] * b_rows.to(tl.float32), axis=0)
        for first in range(ROWS, rank, ROWS):
            factor = load_b(a, first + row, first + row < rank, k, k < columns, 1, columns, False)
            h = _h_of_rows(factor, a, u, first + row, rank, height, columns, BLOCK_K)
            factor = load_b(b, first + row, first + row < rank, column, inside, 1, COLUMNS, False)
            total += tl.sum(h[:, None] * factor.to(tl.float32), axis=0)
    else:
        total += _added_by_rows(product, u, column, inside, COLUMNS)
    return scale * total


# --- h is given -----------------------------------------------------------------------------------------------------


@triton.jit
def factor_of_slot(pool, slots, scales, site, slot, num_slots, OUT: tl.constexpr):
    """A slot's B [r, OUT / blocks] at a site whose h is given.

    Returns:
        b, scale, rank (0 without adapter), blocks and the first column that B writes; and whether B is one block, and
        that column and OUT are multiples of 8.
    """
    b, scale, rank, blocks, start = b_of_slot(pool, slots, scales, site, slot, num_slots)
    return b, scale, rank, blocks, start, (OUT % 8 == 0) & (blocks == 1) & (start % 8 == 0)


@triton.jit
def _plain_rows(b, row, is_row, column, inside, start, OUT: tl.constexpr):
    """Rows of B, which is plain and writes OUT columns from ``start`` on, at some columns; zeros at the others."""
    own = column - known_multiple_of_8(start)
    return load_b(b, row, is_row, own, inside & (own >= 0) & (own < OUT), 1, OUT, False)


@triton.jit
def first_rows_of_factor(factor, column, inside, OUT: tl.constexpr, ROWS: tl.constexpr):
    """The first rows of B; zeros where it is not plain."""
    b, _, rank, _, start, is_plain = factor
    row = tl.arange(0, ROWS)
    return _plain_rows(b, row, row < tl.where(is_plain, rank, 0), column, inside, start, OUT)


@triton.jit
def _given_h(h, plane_stride, width, row, rank, PLANES: tl.constexpr, PARTS: tl.constexpr):
    """h of some rows of B; zero behind the last, where it is not read."""
    at = h + h_offset(row, rank, 0, width, 1, PARTS)
    return load_h(at, plane_stride, row < rank, PLANES)


@triton.jit
def lora_of_h(
    factor, first_rows, h, plane_stride, width, column, inside,
    OUT: tl.constexpr, ROWS: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """scale * (B h) at some columns, in float32.

    Args:
        factor: from `factor_of_slot`. first_rows: from `first_rows_of_factor`.
        h: the token's row, float32 [PARTS, width], in the first of PLANES planes, which are summed.
    """
    b, scale, rank, blocks, start, is_plain = factor
    total = tl.zeros(column.shape, dtype=tl.float32)
    if is_plain:
        row = tl.arange(0, ROWS)
        value = _given_h(h, plane_stride, width, row, rank, PLANES, PARTS)
        total += tl.sum(value[:, None] * first_rows.to(tl.float32), axis=0)
        for first in range(ROWS, rank, ROWS):
            rows = _plain_rows(b, first + row, first + row < rank, column, inside, start, OUT)
            value = _given_h(h, plane_stride, width, first + row, rank, PLANES, PARTS)
            total += tl.sum(value[:, None] * rows.to(tl.float32), axis=0)
    else:
        columns, height = OUT // blocks, rank // blocks
        total += b_h_by_row(
            b, column, inside, start, columns, height, rank, h, plane_stride, 0, width, 1, PLANES, PARTS
        )  # fmt: skip
    return scale * total
