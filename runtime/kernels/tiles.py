"""Tile sizes of the kernels; found by `benchmarks/bench_lora_kernels.py --tune` on the GPU that each row names."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes of one launch.

    Attributes:
        splits: planes of h, each a share of the columns of A.
        shrink_r, shrink_k: rows and columns of A that a program holds at once.
        expand_r, expand_o: rows of B and columns of y that a program holds at once.
        shrink_warps, expand_warps: warps of a program.
    """

    splits: int
    shrink_r: int
    shrink_k: int
    expand_r: int
    expand_o: int
    shrink_warps: int = 4
    expand_warps: int = 4


@dataclass(frozen=True, slots=True)
class ApplyTiles:
    """Sizes of one launch of `apply_tokens`.

    Attributes:
        rows: rows of both factors that a program holds at once.
        depth: columns of A that a program holds at once.
        columns: columns of y that a program owns.
        warps: of a program.
        overlap: programmatic dependent launch.
    """

    rows: int
    depth: int
    columns: int
    warps: int
    overlap: bool = False


BY_TOKEN_LIMIT = 256
"""Tokens up to which a program works for one token; above it for a segment of tokens that share a slot."""

SEGMENT_TOKENS = 32
"""Tokens of a segment at most."""


def apply_tiles_for(tokens: int) -> ApplyTiles:
    """Sizes for a call of ``tokens`` tokens: more columns a program when tokens alone fill the GPU."""
    return ApplyTiles(rows=8, depth=1024, columns=512 if tokens <= 16 else 1024, warps=4, overlap=_can_overlap())


@cache
def _can_overlap() -> bool:
    """Programmatic dependent launch exists from Hopper on, and not in the interpreter."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def tiles_for(tokens: int, in_features: int, width: int) -> Tiles:
    """Sizes for a call of ``tokens`` tokens with ``in_features`` columns of x and local ranks up to ``width``."""
    if tokens > BY_TOKEN_LIMIT:
        rows = 16 if width <= 16 else 32
        return Tiles(splits=1 if tokens >= 512 else 4, shrink_r=rows, shrink_k=128, expand_r=rows, expand_o=128)
    wanted = 4 if tokens <= 16 else 2
    splits = max(1, min(wanted, in_features // 512))
    return Tiles(splits=splits, shrink_r=4, shrink_k=512, expand_r=4, expand_o=512)
