"""Launching the kernels of `norm.py`."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from bdlora_compile.runtime.kernels.launch import ELEMENTS_OF_A_WARP, Factors, pdl
from bdlora_compile.runtime.kernels.norm import (
    MAX_RANKS,
    MAX_ROWS,
    PLACE_BYTES,
    add_norm_rows,
    all_reduce_add_norm_rows,
)
from bdlora_compile.runtime.kernels.tiles import can_overlap

_MOST_WARPS = 16
_FEWEST_WARPS = 4
"""Of a program with LoRA."""
_ELEMENTS_OF_A, _ELEMENTS_OF_B = 16 * 32, 128 * 32
"""That a warp holds at once, at most."""


def can_exchange(rows: int, columns: int, element_size: int, ranks: int) -> bool:
    """Whether a mailbox has room for a call."""
    return rows <= MAX_ROWS.value and columns * element_size <= PLACE_BYTES.value and ranks <= MAX_RANKS.value


class Ahead(NamedTuple):
    """The LoRA of the product ahead, which x lacks.

    Attributes:
        u: [rows, any columns], the product's input.
        factors: where those of its one site lie.
        scales: float32 [sites, S].
        width: no slot has a larger local rank there.
    """

    u: Tensor
    factors: Factors
    scales: Tensor
    width: int


def reduce_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mailbox: Tensor,
    epsilon: float,
    rank: int,
    ranks: int,
    ahead: Ahead | None = None,
) -> tuple[Tensor, Tensor]:
    """(residual + the sum of all ranks' x, its norm), [rows, columns] each; `can_exchange` has been asked.

    ``ahead``: LoRA that is added to x before.
    """
    total, normed = torch.empty_like(x), torch.empty_like(x)
    rows, options = x.shape[0], _options(x.shape[1])
    lora: tuple[Tensor | int | None, ...] = (None, None, None, None, None, 0, 0)
    tiles = {"IN": 0, "ROWS": 1, "BLOCK_K": 1}
    if ahead is not None:
        factors, options["num_warps"] = ahead.factors, max(options["num_warps"], _FEWEST_WARPS)
        lora = (
            ahead.u, factors.pool, factors.slots, ahead.scales, factors.token_slot, factors.num_slots, factors.sites[0]
        )  # fmt: skip
        tiles = _tiles(options["BLOCK"], options["num_warps"], ahead)
    all_reduce_add_norm_rows[(rows,)](
        x, residual, weight, mailbox, total, normed, epsilon, *lora, RANK=rank, RANKS=ranks, **tiles, **options
    )
    return total, normed


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(residual + x, its norm), [rows, columns] each, for x that is the sum already."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    rows, columns = x.shape
    add_norm_rows[(rows,)](x, residual, weight, total, normed, epsilon, **_options(columns))
    return total, normed


def _options(columns: int) -> dict[str, int]:
    overlap = can_overlap()
    block = triton.next_power_of_2(columns)
    warps = min(max(1, block // ELEMENTS_OF_A_WARP), _MOST_WARPS)
    return {"COLUMNS": columns, "BLOCK": block, "OVERLAP": overlap, "num_warps": warps, **pdl(overlap)}


def _tiles(block: int, warps: int, ahead: Ahead) -> dict[str, int]:
    """How much of both factors a program holds at once."""
    rows = min(triton.next_power_of_2(ahead.width), max(1, warps * _ELEMENTS_OF_B // block))
    in_features = ahead.u.shape[1]
    columns = min(triton.next_power_of_2(in_features), max(1, warps * _ELEMENTS_OF_A // rows))
    return {"IN": in_features, "ROWS": rows, "BLOCK_K": columns}
