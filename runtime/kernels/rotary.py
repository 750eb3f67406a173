"""Between the product of q, k and v and attention, in one launch: q and k rotated, k and v written to the cache.

For few tokens it adds what LoRA adds to the product first (`delta.py`). A program has some heads of q, of k or of v, of
one token. A rotation pairs column j of a head with column j + d / 2: a program holds its heads' first halves and their
second halves apart.
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.fields import (
    choose,
    let_next_kernel_start,
    rounded_sum,
    site_and_tile,
    wait_for_kernel_ahead,
)

_VARYING = ["seq", "room", "angles_of_a_row"]
"""Numbers that differ from call to call: one compiled kernel serves all of them."""


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
    y, cos, sin, keys, values, lengths, q, delta, seq, room, angles_of_a_row, c_b, c_h, c_l,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr,
    HAS_DELTA: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, tiles of BLOCK_H heads of q, then of k, then of v). HALF: a power of two that holds DIM / 2.

    y [T, (HEADS + 2 KV_HEADS) DIM], T tokens of rows of ``seq``; q [T, HEADS, DIM] is written.
    cos, sin [rows of them, seq, DIM], one for all rows (``angles_of_a_row`` 0) or one for each (``seq``).
    keys, values: strides in elements by row, head and token (c); a token's values lie together.
    HAS_DELTA: delta, like y, is what y lacks.
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
    wait_for_kernel_ahead(OVERLAP)
    let_next_kernel_start(OVERLAP)
    at = token.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * DIM) + choose(index, 0, HEADS, HEADS + KV_HEADS) * DIM
    x_low = tl.load(y + at + low, mask=inside, other=0.0)
    x_high = tl.load(y + at + high, mask=inside, other=0.0)
    row, i = token // seq, token % seq
    position = tl.load(lengths + row).to(tl.int64) + i
    if HAS_DELTA:
        x_low = rounded_sum(x_low, tl.load(delta + at + low, mask=inside, other=0.0))
        x_high = rounded_sum(x_high, tl.load(delta + at + high, mask=inside, other=0.0))
    if index < 2:
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
