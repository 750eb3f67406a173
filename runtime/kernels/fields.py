"""What the kernels share: a slot's row of the table, a program's site, rows of B, places in h, and waiting for other
kernels.
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels import tiles

# Columns of the slot table, as `SlotField` has them (a kernel reads constants of its own module only).
A_OFFSET: tl.constexpr = tl.constexpr(0)
B_OFFSET: tl.constexpr = tl.constexpr(1)
A_RANK: tl.constexpr = tl.constexpr(2)
B_RANK: tl.constexpr = tl.constexpr(3)
A_BLOCKS: tl.constexpr = tl.constexpr(4)
B_BLOCKS: tl.constexpr = tl.constexpr(5)
OUT_START: tl.constexpr = tl.constexpr(6)
NUM_FIELDS: tl.constexpr = tl.constexpr(7)
SEGMENT_FIELDS: tl.constexpr = tl.constexpr(tiles.SEGMENT_FIELDS)

VARYING = ["num_slots", "tokens", "n_sites", "site0", "site1", "site2"]
"""Numbers of shrinks and deltas that differ from layer to layer or call to call: one kernel serves all of them."""

MAX_SITES = 3
"""Sites of one call: q, k and v."""


@triton.jit
def choose(index, first, second, third):
    """The value of one of up to three sites."""
    return tl.where(index == 0, first, tl.where(index == 1, second, third))


@triton.jit
def site_and_tile(tile, tiles0, tiles1):
    """Which site a column tile of a call belongs to, and its number among the site's tiles."""
    index = tl.where(tile < tiles0, 0, tl.where(tile < tiles0 + tiles1, 1, 2))
    return index, tile - choose(index, 0, tiles0, tiles0 + tiles1)


@triton.jit
def slot_row(slots, site, slot, num_slots):
    """Where a slot's fields at a site begin."""
    return slots + (site.to(tl.int64) * num_slots + slot) * NUM_FIELDS


@triton.jit
def load_segment(segments, number):
    """(slot, start in the order, count) of a segment."""
    row = segments + number * SEGMENT_FIELDS
    return tl.load(row), tl.load(row + 1), tl.load(row + 2)


@triton.jit
def load_place(segments, place):
    """(its token's slot, start and count of the segment that it lies in) of a place in the order."""
    row = segments + place * SEGMENT_FIELDS + 3
    return tl.load(row), tl.load(row + 1), tl.load(row + 2)


@triton.jit
def wait_for_kernel_ahead(OVERLAP: tl.constexpr):
    """Programmatic dependent launch: this kernel may have been started before the one ahead of it in the stream ended.

    Every program waits once, also one that has nothing to do: who waits for this kernel waits for the one ahead too.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_kernel_start(OVERLAP: tl.constexpr):
    """The next kernel may start once all programs of this one have come here or ended.

    Called behind `wait_for_kernel_ahead`, the next kernel knows that all but this one has ended. Called before, it must
    wait for this one before it reads what an earlier one writes.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def rows_of_tile(tile, size, columns, height, BLOCK_O: tl.constexpr):
    """(first, behind the last) row of the blocks of B that a tile of columns lies in; all rows if B is one block."""
    last = tl.minimum((tile + 1) * BLOCK_O, size) - 1
    return tile * BLOCK_O // columns * height, (last // columns + 1) * height


@triton.jit
def load_b(b, row, is_row, o, is_column, height, columns, IS_PACKED: tl.constexpr):
    """Rows ``row`` of B at a site's columns ``o``, [rows, columns]; zero where a row's block writes no such column."""
    inside = is_row[:, None] & is_column[None, :]
    within = o[None, :]
    if IS_PACKED:
        block = row // height
        inside = inside & ((o // columns)[None, :] == block[:, None])
        within = o[None, :] - (block * columns)[:, None]
    return tl.load(b + row[:, None] * columns + within, mask=inside, other=0.0)


@triton.jit
def h_offset(j, rank, index, width, n_sites, PARTS: tl.constexpr):
    """Where element j of a slot's rank lies in a token's row of h, [PARTS, n_sites, width]."""
    if PARTS == 1:
        return index * width + j
    # A slot without an adapter has no rank: nothing is read then.
    share = tl.maximum(rank // PARTS, 1)
    return (j // share * n_sites + index) * width + j % share


@triton.jit
def load_h(at, plane_stride, mask, PLANES: tl.constexpr):
    """h at some places of the first plane, [R]; all planes are summed, in their order.

    Many planes are one load, of which each thread does a share: apart, each would do all of them.
    """
    if PLANES <= 2:
        value = tl.load(at, mask=mask, other=0.0)
        if PLANES == 2:
            value += tl.load(at + plane_stride, mask=mask, other=0.0)
        return value
    BLOCK: tl.constexpr = triton.next_power_of_2(PLANES)
    plane = tl.arange(0, BLOCK)[:, None]
    values = tl.load(at[None, :] + plane * plane_stride, mask=(plane < PLANES) & mask[None, :], other=0.0)
    return tl.sum(values, axis=0)


@triton.jit
def rounded_sum(x, more):
    """x and what it lacks (`delta.py`), in the dtype of x."""
    return (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)


@triton.jit
def known_multiple_of_8(x):
    """x, which is a multiple of 8, as a value of its own that Triton knows to be one: loads of 16 bytes.

    `tl.multiple_of` marks the operation that made a value, for all who read it: here also a branch in which it is none.
    """
    return tl.multiple_of(x // 8 * 8, 8)
