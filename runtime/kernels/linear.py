"""y = x W^T + scale * (B (A x)) in one launch, for few tokens: a product bound by the bytes of W, with LoRA inside.

Programs stream W: each has a tile of y's columns and a share of the sum. They hold some rows of B, wait for h = A x,
and add B h to their share; the last one to arrive at a tile adds its shares up, in a fixed order.

h is made by the first programs of the grid, one (token, site, rows of A, part of its columns) each, or (AHEAD) by
`shrink_tokens` in a launch of its own, beside which this one starts. The first saves a launch; the second leaves the
multiprocessors to the programs that stream W sooner, which pays where h is much work.

Programs that wait come later in the grid than those they wait for, which wait for none of them: no deadlock where not
all fit the GPU at once. Whoever is last sets the counters to zero again, so that no launch has to.
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.fields import (
    A_BLOCKS,
    A_OFFSET,
    A_RANK,
    B_BLOCKS,
    B_OFFSET,
    B_RANK,
    NUM_FIELDS,
    OUT_START,
    choose,
    known_multiple_of_8,
    let_next_kernel_start,
    slot_row,
    wait_for_kernel_ahead,
)

_VARYING = ["tokens", "num_slots", "site0", "site1", "site2"]
"""Numbers that differ from layer to layer: one compiled kernel serves all of them."""

H_READY: tl.constexpr = tl.constexpr(0)
H_READ: tl.constexpr = tl.constexpr(1)
FIRST_TILE: tl.constexpr = tl.constexpr(2)
"""Counters: parts of h that are there, programs that have waited for them, and the arrivals at each tile."""


@triton.jit
def _make_h(
    x, h, counters, pool, slots, token_slot, tokens, x_stride, num_slots, site0, site1, site2, number,
    N_SITES: tl.constexpr, IN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some of a token's h at a site over some columns of A, h [PLANES, T, N_SITES, WIDTH]; then count it."""
    plane, rest = number % PLANES, number // PLANES
    first_row, rest = rest % (WIDTH // ROWS) * ROWS, rest // (WIDTH // ROWS)
    index, token = rest % N_SITES, rest // N_SITES
    chosen = tl.load(token_slot + token)
    slot = tl.maximum(chosen, 0)
    fields = slot_row(slots, choose(index, site0, site1, site2), slot, num_slots)
    rank = tl.where(chosen < 0, 0, tl.load(fields + A_RANK).to(tl.int32))
    blocks = tl.maximum(tl.load(fields + A_BLOCKS).to(tl.int32), 1)
    a = pool + tl.multiple_of(tl.load(fields + A_OFFSET), 16)
    row = first_row + tl.arange(0, ROWS)
    is_row = (row < rank)[:, None]
    x_row = x + token.to(tl.int64) * x_stride
    if blocks == 1:
        k = plane * BLOCK_K + tl.arange(0, BLOCK_K)
        is_inside = is_row if IN % BLOCK_K == 0 else is_row & (k < IN)[None, :]
        factor = tl.load(a + row[:, None] * IN + k[None, :], mask=is_inside, other=0.0)
        wait_for_kernel_ahead(OVERLAP)
        let_next_kernel_start(OVERLAP)
        value = tl.load(x_row + k, mask=(k < IN) & (first_row < rank), other=0.0)
        total = tl.sum(factor.to(tl.float32) * value.to(tl.float32)[None, :], axis=1)
    else:
        wait_for_kernel_ahead(OVERLAP)
        let_next_kernel_start(OVERLAP)
        # A block of A sees its part of x. In short parts: seldom used, and must not cost the others registers.
        PART: tl.constexpr = BLOCK_K if BLOCK_K < 256 else 256
        columns = IN // blocks
        first_column = row // tl.maximum(rank // blocks, 1) * columns
        total = tl.zeros([ROWS], dtype=tl.float32)
        for part in range(0, BLOCK_K, PART):
            k_part = plane * BLOCK_K + part + tl.arange(0, PART)
            inside = is_row & (k_part < columns)[None, :]
            factors = tl.load(a + row[:, None] * columns + k_part[None, :], mask=inside, other=0.0)
            values = tl.load(x_row + first_column[:, None] + k_part[None, :], mask=inside, other=0.0)
            total += tl.sum(factors.to(tl.float32) * values.to(tl.float32), axis=1)
    at = h + ((plane * tokens + token) * N_SITES + index) * WIDTH + row
    tl.store(at, total, mask=row < rank)
    tl.debug_barrier()
    tl.atomic_add(counters + H_READY, 1, sem="release")


@triton.jit
def _load_b(pool, b_offset, rank, columns, height, within, j):
    """Rows ``j`` [J] of each token's B at a tile's columns ``within`` [T, O] of its slot: [J, T, O]."""
    block = j[:, None] // height[None, :]
    own = within[None, :, :] - (block * columns[None, :])[:, :, None]
    inside = (j[:, None] < rank[None, :])[:, :, None] & (own >= 0) & (own < columns[None, :, None])
    rows = b_offset[None, :] + j[:, None] * columns[None, :]
    return tl.load(pool + rows[:, :, None] + own, mask=inside, other=0.0)


@triton.jit
def _wait_for_h(counters, goal, readers, AHEAD: tl.constexpr, OVERLAP: tl.constexpr):
    """Until all of h is there."""
    if AHEAD:
        wait_for_kernel_ahead(OVERLAP)
    else:
        while tl.atomic_add(counters + H_READY, 0, sem="acquire") < goal:
            pass
        # Nobody waits any more once all have come here.
        if tl.atomic_add(counters + H_READ, 1, sem="relaxed") == readers - 1:
            tl.store(counters + H_READY, 0)
            tl.store(counters + H_READ, 0)


@triton.jit
def _load_h(h_token, plane_stride, rank, j, PLANES: tl.constexpr):
    """Elements ``j`` [J] of each token's h, [J, T]; the planes are summed."""
    is_row = j[:, None] < rank[None, :]
    value = tl.zeros([j.shape[0], rank.shape[0]], dtype=tl.float32)
    for plane in tl.static_range(PLANES):
        at = h_token[None, :] + plane * plane_stride + j[:, None]
        value += tl.load(at, mask=is_row, other=0.0, cache_modifier=".cg")
    return value


@triton.jit
def _b_h(
    pool, b_offset, rank, columns, height, within, factor, h_token, plane_stride, j,
    STEP: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """B h [T, O] of a program's rows of B: ``j`` and every STEP rows on. ``factor`` holds the first of them."""
    value = _load_h(h_token, plane_stride, rank, j, PLANES)
    total = tl.sum(value[:, :, None] * factor.to(tl.float32), axis=0)
    if STEP < WIDTH:
        for first in tl.range(STEP, tl.max(rank, axis=0), STEP, num_stages=STAGES):
            more = _load_b(pool, b_offset, rank, columns, height, within, j + first)
            value = _load_h(h_token, plane_stride, rank, j + first, PLANES)
            total += tl.sum(value[:, :, None] * more.to(tl.float32), axis=0)
    return total


@triton.jit(do_not_specialize=_VARYING)
def linear_tokens(
    x, weight, y, shares, h, counters, pool, slots, scales, token_slot,
    tokens, x_stride, num_slots, site0, site1, site2,
    N_SITES: tl.constexpr, IN: tl.constexpr, OUT0: tl.constexpr, OUT1: tl.constexpr, OUT2: tl.constexpr,
    WIDTH: tl.constexpr, A_ROWS: tl.constexpr, PLANES: tl.constexpr, A_COLUMNS: tl.constexpr, B_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (those that make h + column tiles * SPLITS). x [T, IN], W [O, IN], y [T, O], h [PLANES, T, N_SITES, WIDTH].

    O is the sum of OUT*, each a multiple of BLOCK_O; IN is one of SPLITS * BLOCK_K. shares float32 [SPLITS, T, O].
    Those that make h are tokens * N_SITES * row groups * PLANES; none if AHEAD.
    counters int32 [2 + column tiles] are zero, and are so again at the end.
    OVERLAP: the pool, the table and the tokens' slots are read before the kernel ahead in the stream has ended. If
    AHEAD, that is the shrink of this h, which has waited for whoever wrote x: only h is waited for.
    """
    OUT: tl.constexpr = OUT0 + OUT1 + OUT2
    TILES: tl.constexpr = OUT // BLOCK_O
    DEPTH: tl.constexpr = IN // SPLITS
    program = tl.program_id(0)
    goal = 0
    if not AHEAD:
        goal = tokens * (N_SITES * (WIDTH // A_ROWS) * PLANES)
        if program < goal:
            _make_h(
                x, h, counters, pool, slots, token_slot, tokens, x_stride, num_slots, site0, site1, site2, program,
                N_SITES, IN, WIDTH, A_ROWS, PLANES, A_COLUMNS, OVERLAP,
            )  # fmt: skip
            return
    tile = (program - goal) % TILES
    split = (program - goal) // TILES
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.arange(0, BLOCK_T)
    is_token = t < tokens
    index = tl.where(tile * BLOCK_O < OUT0, 0, tl.where(tile * BLOCK_O < OUT0 + OUT1, 1, 2))
    site = choose(index, site0, site1, site2).to(tl.int64)
    size = choose(index, OUT0, OUT1, OUT2)
    chosen = tl.load(token_slot + t, mask=is_token, other=-1)
    slot = tl.maximum(chosen, 0)
    fields = slots + (site * num_slots + slot) * NUM_FIELDS
    rank = tl.where(chosen < 0, 0, tl.load(fields + B_RANK).to(tl.int32))
    blocks = tl.maximum(tl.load(fields + B_BLOCKS).to(tl.int32), 1)
    b_offset = tl.multiple_of(tl.load(fields + B_OFFSET), 16)
    start = tl.load(fields + OUT_START).to(tl.int32)
    scale = tl.load(scales + site * num_slots + slot)
    within = o[None, :] - choose(index, 0, OUT0, OUT0 + OUT1)
    j = split + SPLITS * tl.arange(0, B_ROWS)
    # B is read before x is waited for, where the tile lies in one block of every slot's B: that block is then a factor
    # of its own, with fewer rows and columns. Its sizes are multiples of 8, and loads 16 bytes wide.
    columns = size // blocks
    is_in_one = (start % 8 == 0) & ((blocks == 1) | ((columns % BLOCK_O == 0) & (start == 0)))
    is_plain = tl.min(is_in_one.to(tl.int32), axis=0) == 1
    first_column = tile * BLOCK_O - choose(index, 0, OUT0, OUT0 + OUT1)
    block = tl.where(blocks == 1, 0, first_column // columns)
    own_rank = rank // blocks
    first_row = block * own_rank
    own_columns = known_multiple_of_8(columns)
    own_offset = b_offset + tl.multiple_of(first_row * own_columns, 8)
    own_within = within - tl.multiple_of(start // 8 * 8 + block * own_columns, 8)[:, None]
    one_block = tl.zeros_like(rank) + WIDTH
    factor = _load_b(pool, own_offset, tl.where(is_plain, own_rank, 0), own_columns, one_block, own_within, j)
    if not AHEAD:
        wait_for_kernel_ahead(OVERLAP)
    let_next_kernel_start(OVERLAP)
    total = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    k = split * DEPTH + tl.arange(0, BLOCK_K)
    x_at = x + t[:, None].to(tl.int64) * x_stride + k[None, :]
    w_at = weight + o[None, :].to(tl.int64) * IN + k[:, None]
    for _ in tl.range(0, DEPTH // BLOCK_K, num_stages=STAGES):
        x_tile = tl.load(x_at, mask=is_token[:, None], other=0.0)
        w_tile = tl.load(w_at)
        total = tl.dot(x_tile, w_tile, total)
        x_at += BLOCK_K
        w_at += BLOCK_K
    _wait_for_h(counters, goal, TILES * SPLITS, AHEAD, OVERLAP)
    h_token = h + (t * N_SITES + index) * WIDTH
    plane_stride = tokens * (N_SITES * WIDTH)
    if is_plain:
        added = _b_h(
            pool, own_offset, own_rank, own_columns, one_block, own_within, factor, h_token + first_row, plane_stride,
            j, SPLITS * B_ROWS, WIDTH, PLANES, STAGES,
        )  # fmt: skip
    else:
        height = tl.maximum(own_rank, 1)
        moved = within - start[:, None]
        first = _load_b(pool, b_offset, rank, columns, height, moved, j)
        added = _b_h(
            pool, b_offset, rank, columns, height, moved, first, h_token, plane_stride, j,
            SPLITS * B_ROWS, WIDTH, PLANES, STAGES,
        )  # fmt: skip
    total += scale[:, None] * added
    at = t[:, None] * OUT + o[None, :]
    if SPLITS > 1:
        tl.store(shares + split * tokens * OUT + at, total, mask=is_token[:, None], cache_modifier=".cg")
        tl.debug_barrier()
        if tl.atomic_add(counters + FIRST_TILE + tile, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(counters + FIRST_TILE + tile, 0)
        total = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
        for other in tl.static_range(SPLITS):
            total += tl.load(
                shares + other * tokens * OUT + at, mask=is_token[:, None], other=0.0, cache_modifier=".cg"
            )
    tl.store(y + at, total.to(y.dtype.element_ty), mask=is_token[:, None])
