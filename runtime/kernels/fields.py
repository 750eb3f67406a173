"""What the kernels share: a slot's row of the table, and the site that a program works for."""

import triton
import triton.language as tl

# Columns of the slot table, as `SlotField` has them (a kernel reads constants of its own module only).
A_OFFSET: tl.constexpr = tl.constexpr(0)
B_OFFSET: tl.constexpr = tl.constexpr(1)
A_RANK: tl.constexpr = tl.constexpr(2)
B_RANK: tl.constexpr = tl.constexpr(3)
A_BLOCKS: tl.constexpr = tl.constexpr(4)
B_BLOCKS: tl.constexpr = tl.constexpr(5)
OUT_START: tl.constexpr = tl.constexpr(6)
NUM_FIELDS: tl.constexpr = tl.constexpr(7)

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
