"""Launching the kernels of `norm.py`."""

from typing import Any, NamedTuple

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


class Given(NamedTuple):
    """The same, where A u is given.

    Attributes:
        h: float32 [planes, rows, parts, width], contiguous. Planes are summed; parts lie side by side, each with an
            equal share of a slot's rank at the left.
        factors: where those of its one site lie; A is not read.
        scales: float32 [sites, S].
        out_features: columns that B writes, from the slot's OUT_START on; those past x's are dropped.
        parts: ranks whose shares of h these are.
    """

    h: Tensor
    factors: Factors
    scales: Tensor
    out_features: int
    parts: int


def reduce_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mailbox: Tensor,
    epsilon: float,
    rank: int,
    ranks: int,
    ahead: Ahead | Given | None = None,
) -> tuple[Tensor, Tensor]:
    """(residual + the sum of all ranks' x, its norm), [rows, columns] each; `can_exchange` has been asked.

    ``ahead``: LoRA that is added to x before.
    """
    total, normed = torch.empty_like(x), torch.empty_like(x)
    rows, options = x.shape[0], _options(x.shape[1])
    lora = _NO_LORA
    if ahead is not None:
        options["num_warps"] = max(options["num_warps"], _FEWEST_WARPS)
        lora = _lora(ahead, options["BLOCK"], options["num_warps"])
    all_reduce_add_norm_rows[(rows,)](
        x, residual, weight, mailbox, total, normed, epsilon, **lora, RANK=rank, RANKS=ranks, **options
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


_NO_LORA: dict[str, Any] = {
    **dict.fromkeys(("u", "h", "pool", "slots", "scales", "token_slot")),
    **{"num_slots": 0, "site": 0, "width": 0, "ROWS": 1, "IN": 0, "BLOCK_K": 1, "PLANES": 0, "PARTS": 1, "OUT": 0},
}
"""The kernel's arguments for an x that lacks none."""


def _lora(ahead: Ahead | Given, block: int, warps: int) -> dict[str, Any]:
    """The same for one that does: where the LoRA lies, and how much of its factors a program holds at once."""
    pool, slots, token_slot, (site,) = ahead.factors
    bank = {"pool": pool, "slots": slots, "scales": ahead.scales, "token_slot": token_slot}
    lora = {**_NO_LORA, **bank, "num_slots": ahead.factors.num_slots, "site": site}
    most_rows = max(1, warps * _ELEMENTS_OF_B // block)
    if isinstance(ahead, Given):
        planes, width, parts = ahead.h.shape[0], ahead.h.shape[-1], ahead.parts
        rows = min(triton.next_power_of_2(parts * width), most_rows)
        own = {"h": ahead.h, "width": width, "PLANES": planes, "PARTS": parts, "OUT": ahead.out_features}
    else:
        rows, in_features = min(triton.next_power_of_2(ahead.width), most_rows), ahead.u.shape[1]
        columns = min(triton.next_power_of_2(in_features), max(1, warps * _ELEMENTS_OF_A // rows))
        own = {"u": ahead.u, "IN": in_features, "BLOCK_K": columns}
    return {**lora, **own, "ROWS": rows}
