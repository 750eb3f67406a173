"""Launching the kernels of `norm.py`."""

from typing import Any

import torch
import triton
from torch import Tensor

from bdlora_compile.runtime.kernels import launch, norm
from bdlora_compile.runtime.kernels.fields import MAX_SITES
from bdlora_compile.runtime.kernels.tiles import can_overlap

PLANES = norm.PLANES.value
"""Of h: whoever reads it sums them."""
_ELEMENTS_OF_A_WARP = 256
"""16 bytes of bf16 for each thread."""
_MOST_WARPS = 16
_ELEMENTS_OF_A = 64 * 32
"""Of LoRA's factor, that a warp holds at once: 64 a thread."""
_FEWEST_WARPS, _MOST_FOR_A = 4, 8
"""Of a program that makes h; more than the second only where the norm alone takes more."""


def can_exchange(rows: int, columns: int, element_size: int, ranks: int) -> bool:
    """Whether a mailbox has room for a call."""
    fits = columns * element_size <= norm.PLACE_BYTES.value
    return rows <= norm.MAX_ROWS.value and fits and ranks <= norm.MAX_RANKS.value


def parts_of(rows: int, columns: int) -> int:
    """Units of a row: as many as fit on a device at once, each a multiple of 8 columns if they are several."""
    parts = PLANES
    while parts > 1 and (rows * parts > norm.MAX_ROWS.value or columns % (parts * 8)):
        parts //= 2
    return parts


def reduce_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, mailbox: Tensor, epsilon: float, rank: int, ranks: int
) -> tuple[Tensor, Tensor]:
    """(residual + the sum of all ranks' x, its norm), [rows, columns] each; `can_exchange` has been asked."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    parts, block = _cut(*x.shape)
    _launch(
        (x, residual, weight, mailbox, total, normed, epsilon), (None, None, None, None, 0, 0, 0, 0, 0),
        RANK=rank, RANKS=ranks, PARTS=parts, BLOCK=block, N_SITES=0, ROWS=1, num_warps=_warps(block),
    )  # fmt: skip
    return total, normed


def reduce_add_norm_shrink(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mailbox: Tensor,
    epsilon: float,
    rank: int,
    ranks: int,
    factors: launch.Factors,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and planes of h = A times the norm, float32 [PLANES, rows, n, width].

    What no slot writes is undefined: rows of tokens without adapter, and columns past a slot's rank.
    """
    total, normed = torch.empty_like(x), torch.empty_like(x)
    sites = tuple(factors.sites)
    h = x.new_empty(PLANES, x.shape[0], len(sites), width, dtype=torch.float32)
    parts, block = _cut(*x.shape)
    rows, warps = _tile_of_a(block, len(sites) * width)
    _launch(
        (x, residual, weight, mailbox, total, normed, epsilon),
        (factors.pool, factors.slots, factors.token_slot, h, factors.num_slots, width, *(*sites, 0, 0)[:MAX_SITES]),
        RANK=rank, RANKS=ranks, PARTS=parts, BLOCK=block, N_SITES=len(sites), ROWS=rows, num_warps=warps,
    )  # fmt: skip
    return total, normed, h


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(residual + x, its norm), [rows, columns] each, for x that is the sum already."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    rows, columns = x.shape
    overlap, block = can_overlap(), triton.next_power_of_2(columns)
    kernel = norm.add_norm_rows
    kernel[(rows,)](
        x, residual, weight, total, normed, epsilon, COLUMNS=columns, BLOCK=block, OVERLAP=overlap,
        num_warps=_warps(block), **launch.pdl(overlap),
    )  # fmt: skip
    return total, normed


def h_of(normed: Tensor, factors: launch.Factors, width: int) -> Tensor:
    """Planes of h as `reduce_add_norm_shrink` has them, all in the first one, for a norm that is there already."""
    planes = launch.shrink(normed, factors, None, width)
    h = planes.new_zeros(PLANES, *planes.shape[1:])
    torch.sum(planes, 0, out=h[0])
    return h


def _launch(values: tuple[Any, ...], lora: tuple[Any, ...], **constants: int) -> None:
    (rows, columns), overlap = values[0].shape, can_overlap()
    kernel = norm.all_reduce_add_norm_rows
    kernel[(rows * constants["PARTS"],)](
        *values, *lora, COLUMNS=columns, **constants, OVERLAP=overlap, **launch.pdl(overlap)
    )


def _cut(rows: int, columns: int) -> tuple[int, int]:
    """(parts of a row, columns of a part, as a power of two)."""
    parts = parts_of(rows, columns)
    return parts, triton.next_power_of_2(columns // parts)


def _warps(block: int) -> int:
    return min(max(1, block // _ELEMENTS_OF_A_WARP), _MOST_WARPS)


def _tile_of_a(block: int, rows: int) -> tuple[int, int]:
    """(rows of A that a program holds at once, its warps): all, if that is not too much for its threads."""
    rows = triton.next_power_of_2(rows)
    warps = max(_warps(block), min(max(_FEWEST_WARPS, rows * block // _ELEMENTS_OF_A), _MOST_FOR_A))
    return max(1, min(rows, warps * _ELEMENTS_OF_A // block)), warps
