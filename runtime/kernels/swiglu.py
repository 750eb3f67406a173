"""m = silu(gate) * up in one launch, with the LoRA of the products on both sides of it, for few tokens.

To gate and up it may add theirs, y += scale * (B h), and for the product behind, down, it may make h = A m. Neither
needs a launch of its own then. A program has some columns of one token; as in `shrink.py`, a share of A's columns
writes a plane of h of its own. How a tile's rows of factors are held: `blocks.py`.
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
    A_BLOCKS,
    A_OFFSET,
    A_RANK,
    let_next_kernel_start,
    slot_row,
    wait_for_kernel_ahead,
)

_VARYING = ["tokens", "num_slots", "width", "width_behind", "gate_site", "up_site", "down_site"]
"""Numbers that differ from layer to layer or from call to call: one compiled kernel serves all of them."""


@triton.jit
def _b_h(
    b, first_rows, o, inside, first, size, start, rank, blocks, is_plain, h, plane_stride, index, width,
    ROWS: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """B h at a tile's columns, [O]. ``first_rows`` are what `first_rows_of_blocks` loaded."""
    columns, height = size // blocks, rank // blocks
    total = tl.zeros(o.shape, dtype=tl.float32)
    if is_plain:
        block = first // columns
        is_second, elements = elements_of_blocks(o, block, columns, height)
        row = tl.arange(0, ROWS)
        own, following = h_of_two_blocks(h, plane_stride, row, block, height, rank, index, width, 2, PLANES, PARTS)
        total += sum_of_rows(first_rows, is_second, own, following)
        for more in range(ROWS, height, ROWS):
            factor = load_rows_of_blocks(b, elements, inside, more + row, height, columns)
            own, following = h_of_two_blocks(
                h, plane_stride, more + row, block, height, rank, index, width, 2, PLANES, PARTS
            )  # fmt: skip
            total += sum_of_rows(factor, is_second, own, following)
    else:
        total += b_h_by_row(
            b, o, inside, start, columns, height, rank, h, plane_stride, index, width, 2, PLANES, PARTS
        )  # fmt: skip
    return total


@triton.jit
def _store_a_m(factor, m, h, row, begin, is_second, height, rank):
    """Store rows of A [R, O] times m, summed over the columns of each of two blocks."""
    product = factor.to(tl.float32) * m.to(tl.float32)[None, :]
    own = begin + row
    tl.store(h + own, tl.sum(tl.where(is_second[None, :], 0.0, product), axis=1), mask=row < height)
    second = tl.sum(tl.where(is_second[None, :], product, 0.0), axis=1)
    tl.store(h + own + height, second, mask=(row < height) & (own + height < rank))


@triton.jit
def _a_m(
    a, first_rows, m, o, inside, first, size, rank, blocks, is_plain, h,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store A m over a tile's columns, in a plane of a token's h."""
    columns, height = size // blocks, rank // blocks
    if is_plain:
        block = first // columns
        is_second, elements = elements_of_blocks(o, block, columns, height)
        row, begin = tl.arange(0, ROWS), block * height
        everything = tl.arange(0, WIDTH)
        is_elsewhere = (everything < begin) | (everything >= begin + 2 * height)
        tl.store(h + everything, tl.zeros([WIDTH], dtype=tl.float32), mask=(everything < rank) & is_elsewhere)
        _store_a_m(first_rows, m, h, row, begin, is_second, height, rank)
        for more in range(ROWS, height, ROWS):
            factor = load_rows_of_blocks(a, elements, inside, more + row, height, columns)
            _store_a_m(factor, m, h, more + row, begin, is_second, height, rank)
    else:
        for j in range(rank):
            within = o - j // height * columns
            factor = tl.load(a + j * columns + within, mask=inside & (within >= 0) & (within < columns), other=0.0)
            tl.store(h + j, tl.sum(factor.to(tl.float32) * m.to(tl.float32), axis=0))


@triton.jit(do_not_specialize=_VARYING)
def swiglu_tokens(
    gate_up, h, m, h_behind, pool, slots, scales, token_slot,
    tokens, num_slots, width, width_behind, gate_site, up_site, down_site,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, EXPAND: tl.constexpr, SHRINK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, tiles of BLOCK columns). gate_up [T, 2 * FEATURES], m [T, FEATURES]; FEATURES is a multiple of 8.

    EXPAND: h float32 [PLANES, T, PARTS, 2, width] is that of gate and up, whose LoRA is not in gate_up yet.
    SHRINK: h_behind float32 [tiles, T, 1, width_behind] is written, for ranks up to WIDTH, a power of two.
    OVERLAP: the pool, the table and the tokens' slots are read before the kernel ahead in the stream has ended.
    """
    token, tile = tl.program_id(0), tl.program_id(1)
    first = tile * BLOCK
    last = tl.minimum(first + BLOCK, FEATURES) - 1
    o = first + tl.arange(0, BLOCK)
    inside = o < FEATURES
    chosen = tl.load(token_slot + token)
    slot = tl.maximum(chosen, 0)
    if EXPAND:
        gate_b, g_scale, g_rank, g_blocks, g_start = b_of_slot(pool, slots, scales, gate_site, chosen, num_slots)
        up_b, u_scale, u_rank, u_blocks, u_start = b_of_slot(pool, slots, scales, up_site, chosen, num_slots)
        g_is_plain = meets_two_blocks(first, last, FEATURES // g_blocks, g_start)
        u_is_plain = meets_two_blocks(first, last, FEATURES // u_blocks, u_start)
        g_rows = first_rows_of_blocks(gate_b, o, inside, first, FEATURES, g_rank, g_blocks, g_is_plain, ROWS)
        u_rows = first_rows_of_blocks(up_b, o, inside, first, FEATURES, u_rank, u_blocks, u_is_plain, ROWS)
        ask_for_more_rows(gate_b, first, last, FEATURES, g_rank, g_blocks, g_is_plain, ROWS, BLOCK, OVERLAP)
        ask_for_more_rows(up_b, first, last, FEATURES, u_rank, u_blocks, u_is_plain, ROWS, BLOCK, OVERLAP)
    if SHRINK:
        fields = slot_row(slots, down_site, slot, num_slots)
        a_rank = tl.where(chosen < 0, 0, tl.load(fields + A_RANK).to(tl.int32))
        a_blocks = tl.maximum(tl.load(fields + A_BLOCKS).to(tl.int32), 1)
        a = pool + tl.multiple_of(tl.load(fields + A_OFFSET), 16)
        a_is_plain = meets_two_blocks(first, last, FEATURES // a_blocks, 0)
        a_rows = first_rows_of_blocks(a, o, inside, first, FEATURES, a_rank, a_blocks, a_is_plain, ROWS)
        ask_for_more_rows(a, first, last, FEATURES, a_rank, a_blocks, a_is_plain, ROWS, BLOCK, OVERLAP)
    wait_for_kernel_ahead(OVERLAP)
    let_next_kernel_start(OVERLAP)
    row = gate_up + token.to(tl.int64) * (2 * FEATURES)
    gate = tl.load(row + o, mask=inside, other=0.0)
    up = tl.load(row + FEATURES + o, mask=inside, other=0.0)
    kind: tl.constexpr = gate.dtype
    if EXPAND:
        h_token = h + token.to(tl.int64) * (2 * PARTS * width)
        stride = tokens.to(tl.int64) * (2 * PARTS * width)
        added = _b_h(
            gate_b, g_rows, o, inside, first, FEATURES, g_start, g_rank, g_blocks, g_is_plain, h_token, stride, 0,
            width, ROWS, PLANES, PARTS,
        )  # fmt: skip
        gate = (gate.to(tl.float32) + g_scale * added).to(kind)
        added = _b_h(
            up_b, u_rows, o, inside, first, FEATURES, u_start, u_rank, u_blocks, u_is_plain, h_token, stride, 1,
            width, ROWS, PLANES, PARTS,
        )  # fmt: skip
        up = (up.to(tl.float32) + u_scale * added).to(kind)
    exact = gate.to(tl.float32)
    # Rounded where transformers' layers round.
    activated = (exact / (1.0 + tl.exp(-exact))).to(kind)
    product = (activated.to(tl.float32) * up.to(tl.float32)).to(kind)
    tl.store(m + token.to(tl.int64) * FEATURES + o, product, mask=inside)
    if SHRINK:
        plane = h_behind + (tile.to(tl.int64) * tokens + token) * width_behind
        _a_m(a, a_rows, product, o, inside, first, FEATURES, a_rank, a_blocks, a_is_plain, plane, ROWS, WIDTH)
