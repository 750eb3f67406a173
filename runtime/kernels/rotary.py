"""Between the product of q, k and v and attention, in one launch: q and k rotated, k and v written to the cache.

For few tokens it may add the product's LoRA first, y += scale * (B h), which needs no launch of its own then. A program
has some heads of q, of k or of v, of one token. A rotation pairs column j of a head with column j + d / 2: a program
holds its heads' first halves and their second halves apart. How a tile's rows of B are held: `blocks.py`.
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.blocks import (
    ask_for_more_rows,
    b_h_by_row,
    b_of_slot,
    elements_of_blocks,
    first_rows_of_blocks,
    h_of_two_blocks,
    load_rows_of_blocks,
    meets_two_blocks,
    sum_of_rows,
)
from bdlora_compile.runtime.kernels.fields import (
    choose,
    let_next_kernel_start,
    site_and_tile,
    wait_for_kernel_ahead,
)

_VARYING = ["seq", "room", "angles_of_a_row", "tokens", "num_slots", "width", "q_site", "k_site", "v_site"]
"""Numbers that differ from layer to layer or from call to call: one compiled kernel serves all of them."""

_N_SITES: tl.constexpr = tl.constexpr(3)


@triton.jit
def _b_h_plain(
    b, low_rows, high_rows, low, high, inside, first, columns, height, rank, h, plane_stride, index, width,
    ROWS: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """B h at columns ``low`` and ``high``, [O] each, that meet at most two blocks."""
    block = first // columns
    low_is_second, low_elements = elements_of_blocks(low, block, columns, height)
    high_is_second, high_elements = elements_of_blocks(high, block, columns, height)
    row = tl.arange(0, ROWS)
    own, following = h_of_two_blocks(h, plane_stride, row, block, height, rank, index, width, _N_SITES, PLANES, PARTS)
    low_total = sum_of_rows(low_rows, low_is_second, own, following)
    high_total = sum_of_rows(high_rows, high_is_second, own, following)
    for turn in range(ROWS, height, ROWS):
        more = turn + row
        own, following = h_of_two_blocks(
            h, plane_stride, more, block, height, rank, index, width, _N_SITES, PLANES, PARTS
        )  # fmt: skip
        factor = load_rows_of_blocks(b, low_elements, inside, more, height, columns)
        low_total += sum_of_rows(factor, low_is_second, own, following)
        factor = load_rows_of_blocks(b, high_elements, inside, more, height, columns)
        high_total += sum_of_rows(factor, high_is_second, own, following)
    return low_total, high_total


@triton.jit
def _product(x, factor):
    """Rounded to the dtype of x, in float32 again."""
    return (x.to(tl.float32) * factor.to(tl.float32)).to(x.dtype).to(tl.float32)


@triton.jit
def _rotated(low, high, cos, sin, within, inside, HALF_DIM: tl.constexpr):
    """Both halves of heads, rounded where transformers' layers round, or once less where the compiler contracts.

    ``cos`` and ``sin`` point at a token's.
    """
    low_cos = tl.load(cos + within, mask=inside, other=0.0)
    low_sin = tl.load(sin + within, mask=inside, other=0.0)
    high_cos = tl.load(cos + HALF_DIM + within, mask=inside, other=0.0)
    high_sin = tl.load(sin + HALF_DIM + within, mask=inside, other=0.0)
    rotated_low = (_product(low, low_cos) - _product(high, low_sin)).to(low.dtype)
    return rotated_low, (_product(high, high_cos) + _product(low, high_sin)).to(low.dtype)


@triton.jit
def _store_halves(to, low, high, inside, HALF_DIM: tl.constexpr):
    tl.store(to, low, mask=inside)
    tl.store(to + HALF_DIM, high, mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def rotate_tokens(
    y, cos, sin, keys, values, lengths, q, h, pool, slots, scales, token_slot,
    seq, room, angles_of_a_row, c_b, c_h, c_l, tokens, num_slots, width, q_site, k_site, v_site,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr, EXPAND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, tiles of BLOCK_H heads of q, then of k, then of v). HALF: a power of two that holds DIM / 2.

    y [T, (HEADS + 2 KV_HEADS) DIM], T tokens of rows of ``seq``; q [T, HEADS, DIM] is written.
    cos, sin [rows of them, seq, DIM], one for all rows (``angles_of_a_row`` 0) or one for each (``seq``).
    keys, values: strides in elements by row, head and token (c); a token's values lie together.
    EXPAND: h float32 [PLANES, T, PARTS * 3, width] is that of q, k and v, whose LoRA is not in y yet.
    OVERLAP: the pool, the table and the tokens' slots are read before the kernel ahead in the stream has ended.
    """
    HALF_DIM: tl.constexpr = DIM // 2
    TILES: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    KV_TILES: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    token = tl.program_id(0)
    index, tile = site_and_tile(tl.program_id(1), TILES, KV_TILES)
    heads = tl.where(index == 0, HEADS, KV_HEADS)
    number = tl.arange(0, BLOCK_H * HALF)
    head, within = tile * BLOCK_H + number // HALF, number % HALF
    inside = (head < heads) & (within < HALF_DIM)
    # Columns of the site: a tile's first halves of heads, and its second ones.
    low = head * DIM + within
    high = low + HALF_DIM
    if EXPAND:
        site = choose(index, q_site, k_site, v_site)
        b, scale, rank, blocks, start = b_of_slot(pool, slots, scales, site, tl.load(token_slot + token), num_slots)
        first, size = tile * (BLOCK_H * DIM), heads * DIM
        last = tl.minimum(first + BLOCK_H * DIM, size) - 1
        is_plain = meets_two_blocks(first, last, size // blocks, start)
        low_rows = first_rows_of_blocks(b, low, inside, first, size, rank, blocks, is_plain, ROWS)
        high_rows = first_rows_of_blocks(b, high, inside, first, size, rank, blocks, is_plain, ROWS)
        ask_for_more_rows(b, first, last, size, rank, blocks, is_plain, ROWS, BLOCK_H * HALF * 2, OVERLAP)
    wait_for_kernel_ahead(OVERLAP)
    let_next_kernel_start(OVERLAP)
    at = y + token.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * DIM) + choose(index, 0, HEADS, HEADS + KV_HEADS) * DIM
    x_low = tl.load(at + low, mask=inside, other=0.0)
    x_high = tl.load(at + high, mask=inside, other=0.0)
    row, i = token // seq, token % seq
    position = tl.load(lengths + row).to(tl.int64) + i
    if EXPAND:
        h_token = h + token.to(tl.int64) * (PARTS * _N_SITES * width)
        stride = tokens.to(tl.int64) * (PARTS * _N_SITES * width)
        columns, height = size // blocks, rank // blocks
        if is_plain:
            added_low, added_high = _b_h_plain(
                b, low_rows, high_rows, low, high, inside, first, columns, height, rank, h_token, stride, index, width,
                ROWS, PLANES, PARTS,
            )  # fmt: skip
        else:
            added_low = b_h_by_row(
                b, low, inside, start, columns, height, rank, h_token, stride, index, width, _N_SITES, PLANES, PARTS
            )  # fmt: skip
            added_high = b_h_by_row(
                b, high, inside, start, columns, height, rank, h_token, stride, index, width, _N_SITES, PLANES, PARTS
            )  # fmt: skip
        x_low = (x_low.to(tl.float32) + scale * added_low).to(x_low.dtype)
        x_high = (x_high.to(tl.float32) + scale * added_high).to(x_high.dtype)
    if index < 2:
        # Read no earlier: beside the rows of B they would cost half as many registers again.
        angle = (row * angles_of_a_row + i).to(tl.int64) * DIM
        x_low, x_high = _rotated(x_low, x_high, cos + angle, sin + angle, within, inside, HALF_DIM)
    if index == 0:
        _store_halves(q + token.to(tl.int64) * (HEADS * DIM) + low, x_low, x_high, inside, HALF_DIM)
    else:
        # A token without room would be another row's: it is left out.
        inside = inside & (position >= 0) & (position < room)
        to = row.to(tl.int64) * c_b + head.to(tl.int64) * c_h + position * c_l + within
        if index == 1:
            _store_halves(keys + to, x_low, x_high, inside, HALF_DIM)
        else:
            _store_halves(values + to, x_low, x_high, inside, HALF_DIM)
