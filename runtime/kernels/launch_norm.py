"""Launching the kernels of `norm.py`."""

import torch
import triton
from torch import Tensor

from bdlora_compile.runtime.kernels.launch import pdl
from bdlora_compile.runtime.kernels.norm import (
    MAX_RANKS,
    MAX_ROWS,
    PLACE_BYTES,
    add_norm_rows,
    all_reduce_add_norm_rows,
)
from bdlora_compile.runtime.kernels.tiles import ELEMENTS_OF_A_WARP, can_overlap

_MOST_WARPS = 16


def can_exchange(rows: int, columns: int, element_size: int, ranks: int) -> bool:
    """Whether there is something to exchange, and a mailbox has room for it."""
    return 0 < rows <= MAX_ROWS.value and columns * element_size <= PLACE_BYTES.value and ranks <= MAX_RANKS.value


def reduce_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mailbox: Tensor,
    epsilon: float,
    rank: int,
    ranks: int,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(residual + the sum of all ranks' x, its norm), [rows, columns] each; `can_exchange` has been asked.

    ``delta``: [at least rows, columns], contiguous, what x lacks.
    """
    total, normed = torch.empty_like(x), torch.empty_like(x)
    all_reduce_add_norm_rows[(x.shape[0],)](
        x, residual, weight, mailbox, delta, total, normed, epsilon, RANK=rank, RANKS=ranks,
        HAS_DELTA=delta is not None, **_options(x.shape[1]),
    )  # fmt: skip
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
