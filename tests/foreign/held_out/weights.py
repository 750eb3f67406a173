"""Whole weights of a gated MLP block with LoRA on its three matrices, and what the block computes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Declare = Callable[[Tensor, int], None]
"""Called with a rank's slice of a block-diagonal factor and the number of blocks of the whole factor."""


@dataclass(frozen=True)
class Weights:
    """Unsharded float64 tensors; `b_up`, `b_gate` and `a_down` are block-diagonal with `nblocks` equal blocks."""

    up: Tensor  # [F, D]
    gate: Tensor  # [F, D]
    down: Tensor  # [D, F]
    a_up: Tensor  # [R, D]
    b_up: Tensor  # [F, R]
    a_gate: Tensor  # [R, D]
    b_gate: Tensor  # [F, R]
    a_down: Tensor  # [R, F]
    b_down: Tensor  # [D, R]
    scale: float
    nblocks: int


def block_mask(rows: int, columns: int, nblocks: int) -> Tensor:
    """Ones in the diagonal blocks, zeros elsewhere."""
    if rows % nblocks or columns % nblocks:
        raise ValueError(f"a {rows} x {columns} matrix has no {nblocks} equal diagonal blocks")
    block = torch.ones(rows // nblocks, columns // nblocks, dtype=torch.float64)
    return torch.block_diag(*[block] * nblocks)


def random_weights(D: int, F: int, R: int, nblocks: int, seed: int) -> Weights:
    """Normal weights, scaled by their number of columns so that no term of the block is small beside the others."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=torch.float64, generator=generator) / columns**0.5

    return Weights(
        up=normal(F, D),
        gate=normal(F, D),
        down=normal(D, F),
        a_up=normal(R, D),
        b_up=normal(F, R) * block_mask(F, R, nblocks),
        a_gate=normal(R, D),
        b_gate=normal(F, R) * block_mask(F, R, nblocks),
        a_down=normal(R, F) * block_mask(R, F, nblocks),
        b_down=normal(D, R),
        scale=1.7,
        nblocks=nblocks,
    )


def lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`W x + scale * B A x`."""
    return F.linear(x, weight) + scale * F.linear(F.linear(x, a), b)


def reference(weights: Weights, x: Tensor) -> Tensor:
    """The block in one process: `x + down(silu(gate(x)) * up(x))`."""
    up = lora_linear(x, weights.up, weights.a_up, weights.b_up, weights.scale)
    gate = lora_linear(x, weights.gate, weights.a_gate, weights.b_gate, weights.scale)
    hidden = F.silu(gate) * up
    return x + lora_linear(hidden, weights.down, weights.a_down, weights.b_down, weights.scale)
