"""Launching the kernels of `norm.py`."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from bdlora_compile.runtime.kernels import launch, norm, norm_lora
from bdlora_compile.runtime.kernels.fields import MAX_SITES
from bdlora_compile.runtime.kernels.tiles import can_overlap

PLANES = norm_lora.PLANES.value
"""Of h: whoever reads it sums them."""
_ELEMENTS_OF_A_WARP = 256
"""16 bytes of bf16 for each thread."""
_MOST_WARPS = 16
_ELEMENTS_HELD = 64 * 32
"""Of A, that a warp holds at once, at most: 64 a thread; half of that, as many of B and a quarter of its own A where it
adds the LoRA of the product ahead as well. More would not stay in registers."""
_FEWEST_WARPS, _MOST_FOR_A = 4, 8
"""Of a program that makes h; more than the second only where a part is wide or it adds LoRA, too."""
_WIDE_PART = 2048
"""Columns."""
_MOST_ROWS = 16
"""Of the factors of the product ahead."""


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


class Before(NamedTuple):
    """A product whose LoRA is not in x yet.

    Attributes:
        u: [rows, any columns], its input.
        site: the row of the slot table that is its factors'.
        width: no slot has a larger local rank there.
    """

    u: Tensor
    site: int
    width: int


class Lora(NamedTuple):
    """LoRA on both sides of a norm.

    Attributes:
        behind: where the factors of the sites lie that read the norm, up to three.
        width: no slot has a larger local rank at those.
        scales: float32 [sites, S].
        before: of the product that x is; None if its LoRA is in x, or it has none.
    """

    behind: launch.Factors
    width: int
    scales: Tensor
    before: Before | None


def reduce_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, mailbox: Tensor, epsilon: float, rank: int, ranks: int
) -> tuple[Tensor, Tensor]:
    """(residual + the sum of all ranks' x, its norm), [rows, columns] each; `can_exchange` has been asked."""
    total, normed, _ = _reduce_add_norm(x, residual, weight, mailbox, epsilon, rank, ranks, None)
    return total, normed


def reduce_add_norm_lora(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mailbox: Tensor,
    epsilon: float,
    rank: int,
    ranks: int,
    lora: Lora,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the LoRA of x added first, and planes of h = A times the norm, float32 [PLANES, rows, n, width].

    What no slot writes of h is undefined: rows of tokens without adapter, and columns past a slot's rank.
    """
    total, normed, h = _reduce_add_norm(x, residual, weight, mailbox, epsilon, rank, ranks, lora)
    assert h is not None, "made with LoRA"
    return total, normed, h


def _reduce_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mailbox: Tensor,
    epsilon: float,
    rank: int,
    ranks: int,
    lora: Lora | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    total, normed = torch.empty_like(x), torch.empty_like(x)
    rows, columns = x.shape
    overlap, parts = can_overlap(), parts_of(rows, columns)
    block = triton.next_power_of_2(columns // parts)
    h, constants = None, _tiles(block, lora)
    arguments: tuple[Tensor | int | None, ...] = (None, None, None, None, None, None, 0, 0, 0, 0, 0, 0)
    if lora is not None:
        factors, before = lora.behind, lora.before
        sites = tuple(factors.sites)
        h = x.new_empty(PLANES, rows, len(sites), lora.width, dtype=torch.float32)
        arguments = (
            factors.pool, factors.slots, lora.scales, factors.token_slot, h, None if before is None else before.u,
            factors.num_slots, lora.width, *(*sites, 0, 0, 0)[:MAX_SITES], 0 if before is None else before.site,
        )  # fmt: skip
    kernel = norm.all_reduce_add_norm_rows
    kernel[(rows * parts,)](
        x, residual, weight, mailbox, total, normed, epsilon, *arguments, RANK=rank, RANKS=ranks, COLUMNS=columns,
        PARTS=parts, BLOCK=block, **constants, OVERLAP=overlap, **launch.pdl(overlap),
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
    """Planes of h as `reduce_add_norm_lora` makes them, all in the first one, for a norm that is there already."""
    planes = launch.shrink(normed, factors, None, width)
    h = planes.new_zeros(PLANES, *planes.shape[1:])
    torch.sum(planes, 0, out=h[0])
    return h


def _warps(block: int) -> int:
    return min(max(1, block // _ELEMENTS_OF_A_WARP), _MOST_WARPS)


def _tiles(block: int, lora: Lora | None) -> dict[str, int]:
    """Constants of a program with so many columns: how many rows of factors it holds at once, and its warps."""
    none = {"N_SITES": 0, "ROWS": 1, "IN": 0, "ROWS_BEFORE": 1, "BLOCK_K": 1, "num_warps": _warps(block)}
    if lora is None:
        return none
    stacked = triton.next_power_of_2(max(1, len(lora.behind.sites) * lora.width))
    held = _ELEMENTS_HELD if lora.before is None else _ELEMENTS_HELD // 2
    most = _MOST_FOR_A if lora.before is None and block < _WIDE_PART else _MOST_WARPS
    warps = max(_warps(block), min(max(_FEWEST_WARPS, stacked * block // held), most))
    rows = max(1, min(stacked, warps * held // block))
    found = none | {"N_SITES": len(lora.behind.sites), "ROWS": rows, "num_warps": warps}
    return found if lora.before is None else found | _tile_of_product(block, warps, lora.before)


def _tile_of_product(block: int, warps: int, before: Before) -> dict[str, int]:
    """The same for both factors of the product ahead."""
    rows = min(triton.next_power_of_2(before.width), _MOST_ROWS, max(1, warps * _ELEMENTS_HELD // block))
    in_features = before.u.shape[1]
    columns = min(triton.next_power_of_2(in_features), max(1, warps * _ELEMENTS_HELD // 4 // rows))
    return {"IN": in_features, "ROWS_BEFORE": rows, "BLOCK_K": columns}
