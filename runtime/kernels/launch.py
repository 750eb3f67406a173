"""Launching the kernels: grids, tile sizes, buffers. Arguments as in `runtime/ops.py`."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from bdlora_compile.runtime.kernels.apply import apply_tokens
from bdlora_compile.runtime.kernels.expand import expand_segments, expand_tokens
from bdlora_compile.runtime.kernels.fields import MAX_SITES
from bdlora_compile.runtime.kernels.shrink import shrink_segments, shrink_tokens
from bdlora_compile.runtime.kernels.tiles import (
    BY_TOKEN_LIMIT,
    SEGMENT_TOKENS,
    ApplyTiles,
    Tiles,
    apply_tiles_for,
    tiles_for,
)


def apply_(
    x: Tensor,
    y: Tensor,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    work: tuple[Tensor, Tensor] | None,
    sites: Sequence[int],
    width: int,
    out_features: Sequence[int],
) -> None:
    """y += scale * (B (A x)), in place: one launch where programs work by token, else a shrink and an expand."""
    if work is None:
        apply_by_token(x, y, pool, slots, scales, token_slot, sites, out_features)
        return
    h = shrink(x, pool, slots, token_slot, work, sites, width)
    expand(y, h, pool, slots, scales, token_slot, work, sites, out_features)


def apply_by_token(
    x: Tensor,
    y: Tensor,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    sites: Sequence[int],
    out_features: Sequence[int],
    tiles: ApplyTiles | None = None,
) -> None:
    """The one launch of `apply_`.

    Args:
        x: [T, D], y: [T, O]; columns contiguous.
    """
    tokens, in_features = x.shape
    tiles = tiles or apply_tiles_for(tokens)
    counts = [triton.cdiv(size, tiles.columns) for size in out_features]
    sizes = (x.stride(0), in_features, y.stride(0), y.shape[1], slots.shape[1], *_three(counts)[:2])
    sizes = (*sizes, *_three(sites), *_three(out_features))
    constants = {"MAX_R": tiles.rows, "BLOCK_K": tiles.depth, "BLOCK_O": tiles.columns, "OVERLAP": tiles.overlap}
    # Asked for only where it is wanted: the interpreter knows no such option.
    launch_options = {"launch_pdl": True} if tiles.overlap else {}
    apply_tokens[(tokens, sum(counts))](
        x, y, pool, slots, scales, token_slot, *sizes, **constants, num_warps=tiles.warps, **launch_options
    )


def shrink(
    x: Tensor,
    pool: Tensor,
    slots: Tensor,
    token_slot: Tensor,
    work: tuple[Tensor, Tensor] | None,
    sites: Sequence[int],
    width: int,
    tiles: Tiles | None = None,
    *,
    zeroed: bool = False,
) -> Tensor:
    """Planes of h, float32 [splits, T, n, width]; what no slot writes is zero only where ``zeroed`` is asked for.

    Args:
        x: [T, D], columns contiguous.
        work: (order, segments) of `segment_work`; None works by token.
    """
    tokens, in_features = x.shape
    tiles = tiles or tiles_for(tokens, in_features, width)
    make = x.new_zeros if zeroed else x.new_empty
    h = make(tiles.splits, tokens, len(sites), width, dtype=torch.float32)
    sizes = (x.stride(0), in_features, slots.shape[1], tokens, width, *_three(sites))
    constants = {"N_SITES": len(sites), "SPLITS": tiles.splits, "BLOCK_R": tiles.shrink_r, "BLOCK_K": tiles.shrink_k}
    if work is None:
        grid = (tokens, len(sites), tiles.splits)
        shrink_tokens[grid](x, pool, slots, token_slot, h, *sizes, **constants, num_warps=tiles.shrink_warps)
    else:
        grid = (num_segments(tokens, slots.shape[1]), len(sites), tiles.splits)
        shrink_segments[grid](
            x, pool, slots, *work, h, *sizes, **constants, BLOCK_T=SEGMENT_TOKENS, num_warps=tiles.shrink_warps
        )
    return h


def expand(
    y: Tensor,
    h: Tensor,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    work: tuple[Tensor, Tensor] | None,
    sites: Sequence[int],
    out_features: Sequence[int],
    parts: int = 1,
    tiles: Tiles | None = None,
) -> None:
    """y += scale * (B h), in place.

    Args:
        y: [T, O], columns contiguous.
        h: float32 [planes, T, parts * n, width].
        work: as for `shrink`.
    """
    tokens, columns = y.shape
    width = h.shape[-1]
    tiles = tiles or tiles_for(tokens, columns, width)
    counts = [triton.cdiv(size, tiles.expand_o) for size in out_features]
    sizes = (y.stride(0), columns, slots.shape[1], tokens, width, *_three(counts)[:2])
    sizes = (*sizes, *_three(sites), *_three(out_features))
    constants = {"N_SITES": len(sites), "PLANES": h.shape[0], "PARTS": parts}
    constants |= {"BLOCK_R": tiles.expand_r, "BLOCK_O": tiles.expand_o}
    if work is None:
        grid = (tokens, sum(counts))
        expand_tokens[grid](y, h, pool, slots, scales, token_slot, *sizes, **constants, num_warps=tiles.expand_warps)
    else:
        grid = (num_segments(tokens, slots.shape[1]), sum(counts))
        expand_segments[grid](
            y, h, pool, slots, scales, *work, *sizes, **constants, BLOCK_T=SEGMENT_TOKENS,
            num_warps=tiles.expand_warps,
        )  # fmt: skip


def _three(values: Sequence[int]) -> tuple[int, ...]:
    """Kernels take the sites of a call as three numbers."""
    return (*values, *(0 for _ in range(MAX_SITES - len(values))))


def works_by_segment(tokens: int) -> bool:
    """Whether a call of so many tokens shares reads of factors between them."""
    return tokens > BY_TOKEN_LIMIT


def num_segments(tokens: int, num_slots: int) -> int:
    """Segments that ``tokens`` tokens of any mix of slots make at most."""
    return min(-(-tokens // SEGMENT_TOKENS) + num_slots, tokens)


def segment_work(token_slot: Tensor) -> tuple[Tensor, Tensor]:
    """Group tokens by slot, on the device and in shapes that do not depend on the mix.

    Args:
        token_slot: int32 [T], -1 for no adapter.

    Returns:
        order: int32 [T], tokens sorted by slot.
        segments: int32 [T, 3]: slot, start in ``order``, count up to SEGMENT_TOKENS; count 0 is no segment. None are
            behind the first `num_segments` rows.
    """
    tokens = token_slot.shape[0]
    by_slot, order = token_slot.sort(stable=True)
    position = torch.arange(tokens, dtype=torch.int32, device=token_slot.device)
    first = torch.searchsorted(by_slot, by_slot, out_int32=True)
    behind = torch.searchsorted(by_slot, by_slot, right=True, out_int32=True)
    begins = ((position - first) % SEGMENT_TOKENS == 0) & (by_slot >= 0)
    count = torch.minimum(behind - position, torch.full_like(position, SEGMENT_TOKENS))
    rows = torch.stack([by_slot, position, count], dim=1)
    # Tokens that begin no segment all write the one row behind the last, which is cut off.
    target = torch.where(begins, begins.cumsum(0) - 1, tokens)
    segments = token_slot.new_zeros(tokens + 1, 3)
    segments.index_copy_(0, target, rows)
    return order.to(torch.int32), segments[:tokens]
