"""Launching the kernels: plans, grids, buffers. Arguments as in `runtime/ops.py`; columns of x and y are contiguous.

``overlap`` asks for programmatic dependent launch: a kernel may be started before the one ahead of it in the stream has
ended, and reads the slot table, the pool and the tokens' slots (beside a product also their grouping) at once. So the
kernel directly ahead must not write them; x and y it may write.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from bdlora_compile.runtime.beside import ended_before_others
from bdlora_compile.runtime.kernels.apply import apply_tokens
from bdlora_compile.runtime.kernels.delta import delta_tokens
from bdlora_compile.runtime.kernels.delta_mixed import delta_mixed
from bdlora_compile.runtime.kernels.expand import expand_segments, expand_tokens
from bdlora_compile.runtime.kernels.fields import MAX_SITES
from bdlora_compile.runtime.kernels.group import group_tokens
from bdlora_compile.runtime.kernels.shrink import shrink_segments, shrink_tokens
from bdlora_compile.runtime.kernels.shrink_mixed import shrink_mixed
from bdlora_compile.runtime.kernels.tiles import (
    BY_TOKEN_LIMIT,
    SEGMENT_FIELDS,
    SHARES,
    TOGETHER,
    Call,
    Expand,
    OneLaunch,
    Plan,
    Shrink,
    can_overlap,
    default_launches,
    delta_tiles,
    h_width,
    plan_for,
    segment_tokens,
    shrink_beside,
)

_ONE_GROUPING_LAUNCH = 1024
"""Tokens up to which one program groups them."""


class Factors(NamedTuple):
    """Where the factors of a call's sites lie, and which adapter each token has; see `runtime/ops.py`.

    Attributes:
        pool: flat pool of factors.
        slots: int64 [sites, S, 7], the slot table.
        token_slot: int32 [at least T].
        sites: rows of ``slots`` that the call serves, up to three.
    """

    pool: Tensor
    slots: Tensor
    token_slot: Tensor
    sites: Sequence[int]

    @property
    def num_slots(self) -> int:
        """S."""
        return self.slots.shape[1]

    @classmethod
    def of(cls, pool: Tensor, slots: Tensor, token_slot: Tensor, sites: Sequence[int]) -> "Factors":
        """What an operator was given, checked.

        Raises:
            ValueError: a tensor is not contiguous, as kernels take for granted.
        """
        require_contiguous(pool=pool, slots=slots, token_slot=token_slot)
        return cls(pool, slots, token_slot, sites)


def require_contiguous(**tensors: Tensor) -> None:
    """Check what kernels take for granted.

    Raises:
        ValueError: names the tensor that is not contiguous.
    """
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tuple(tensor.stride())}; the LoRA kernels "
                "expect it contiguous: keep a contiguous one, written before the kernel ahead of the call"
            )


def rows_of(x: Tensor) -> Tensor:
    """x [..., D] as [T, D] with contiguous columns; a copy only where it has to be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


class Work(NamedTuple):
    """Tokens grouped by slot: ``order`` and ``segments`` of `segment_work`, segments of up to ``size`` tokens."""

    order: Tensor
    segments: Tensor
    size: int


def work_for(tokens: int, order: Tensor, segments: Tensor) -> Work | None:
    """The work of a launch behind a product, as `ops.lora_work` made it; None where programs work by token."""
    return work_beside(tokens, order, segments) if tokens > BY_TOKEN_LIMIT else None


def work_beside(tokens: int, order: Tensor, segments: Tensor) -> Work | None:
    """The same of a launch beside a product; None where tokens are not grouped."""
    size = segment_tokens(tokens)
    return Work(order, segments, size) if size else None


def apply_(
    x: Tensor,
    y: Tensor,
    factors: Factors,
    scales: Tensor,
    work: Work | None,
    width: int,
    out_features: Sequence[int],
    plan: Plan | None = None,
) -> None:
    """y += scale * (B (A x)), in place."""
    plan = plan or plan_for(Call(x.shape[0], x.shape[1], tuple(out_features), width))
    if isinstance(plan, OneLaunch):
        _apply_by_token(x, y, factors, scales, out_features, plan)
        return
    overlap = can_overlap()
    early = plan.overlap and overlap
    work = None if plan.by_token else work
    h = shrink(x, factors, work, width, plan.shrink, overlap=overlap, early=early)
    expand(y, h, factors, scales, work, out_features, 1, plan.expand, overlap=overlap)


def _apply_by_token(
    x: Tensor,
    y: Tensor,
    factors: Factors,
    scales: Tensor,
    out_features: Sequence[int],
    plan: OneLaunch,
) -> None:
    overlap = plan.overlap and can_overlap()
    tokens, in_features = x.shape
    sizes = (x.stride(0), y.stride(0), y.shape[1], factors.num_slots, *_three(factors.sites), in_features)
    grid = (tokens, sum(triton.cdiv(size, plan.columns) for size in out_features))
    apply_tokens[grid](
        x, y, factors.pool, factors.slots, scales, factors.token_slot, *sizes, *_three(out_features), ROWS=plan.rows,
        BLOCK_K=triton.next_power_of_2(in_features), BLOCK_O=plan.columns, OVERLAP=overlap, num_warps=plan.warps,
        **pdl(overlap), **_at_most(plan.registers),
    )  # fmt: skip


def make_h_beside(x: Tensor, factors: Factors, work: Work | None, width: int) -> Tensor:
    """h of few tokens beside their product, [planes, T, n, `h_width`].

    The launch starts while the kernel that writes x ends.
    """
    overlap, width = can_overlap(), h_width(width)
    tiles = shrink_beside(x.shape[0], x.shape[1], width)
    if work is None:
        return shrink(x, factors, None, width, tiles, overlap=overlap, early=overlap)
    (tokens, in_features), n_sites = x.shape, len(factors.sites)
    planes = triton.cdiv(in_features, tiles.depth)
    h = x.new_empty(planes, tokens, n_sites, width, dtype=torch.float32)
    grid = (num_segments(tokens, factors.num_slots, work.size), n_sites, planes * triton.cdiv(width, tiles.rows))
    sizes = (x.stride(0), in_features, factors.num_slots, tokens, width, n_sites, *_three(factors.sites))
    # The tensor cores take 16 columns at least.
    columns = {"BLOCK_K": tiles.depth, "PART_K": max(16, min(tiles.depth, 256))}
    shrink_mixed[grid](
        x, factors.pool, factors.slots, work.order, work.segments, h, *sizes, SPLITS=planes, ROWS=tiles.rows, **columns,
        BLOCK_T=work.size, OVERLAP=overlap, num_warps=tiles.warps, num_stages=tiles.stages, **pdl(overlap),
    )  # fmt: skip
    return h


class Beside(NamedTuple):
    """The second half of LoRA beside a product.

    Attributes:
        factors: where those of the product's sites lie.
        scales: float32 [sites, S].
        out_features: columns that B writes for each site, from a slot's OUT_START on.
        parts: ranks whose shares of h lie side by side.
        work: the tokens grouped by slot; None works token by token.
        together: so many of a group have their delta computed together; fewer go token by token, too.
    """

    factors: Factors
    scales: Tensor
    out_features: Sequence[int]
    parts: int = 1
    work: Work | None = None
    together: int = TOGETHER


def delta(h: Tensor, path: Beside, columns: int, dtype: torch.dtype) -> Tensor:
    """scale * (B h) of few tokens, [`BY_TOKEN_LIMIT`, columns], zero where no adapter adds anything.

    Args:
        h: float32 [planes, T, parts * n, width], contiguous; the kernel ahead is its shrink, launched with ``overlap``,
            or one that does not let others start early.
        columns: of the product. Several sites write all of them, one may write fewer.
    """
    factors, scales, out_features, parts, work, together = path
    planes, tokens, _, width = h.shape
    overlap, n_sites = can_overlap(), len(factors.sites)
    room = (columns,) if n_sites == 1 else tuple(out_features)
    assert sum(room) == columns, "sites lie side by side"
    made = h.new_empty(BY_TOKEN_LIMIT, columns, dtype=dtype)
    tiles = delta_tiles(parts * width)
    grid = (tokens, sum(triton.cdiv(size, tiles.columns) for size in room))
    sizes = (factors.num_slots, tokens, width, n_sites, *_three(factors.sites), *_three(out_features), *_three(room))
    constants = {"PLANES": planes, "PARTS": parts, "BLOCK_R": tiles.rows, "BLOCK_O": tiles.columns, "OVERLAP": overlap}
    options = {"num_warps": tiles.warps, **pdl(overlap)}
    bank = (factors.pool, factors.slots, scales)
    if work is None:
        delta_tokens[grid](made, h, *bank, factors.token_slot, *sizes, **constants, **options)
    else:
        groups = {"BLOCK_T": work.size, "SHARES": SHARES, "TOGETHER": together}
        delta_mixed[grid](made, h, *bank, work.order, work.segments, *sizes, **constants, **groups, **options)
    return made


def shrink(
    x: Tensor,
    factors: Factors,
    work: Work | None,
    width: int,
    tiles: Shrink | None = None,
    *,
    zeroed: bool = False,
    overlap: bool = False,
    early: bool = False,
    parts: int = 1,
    part: int = 0,
) -> Tensor:
    """Planes of h, float32 [planes, T, n, width]; what no slot writes is zero only where ``zeroed`` is asked for.

    ``parts``, by token: h is [planes, T, parts * n, width], of which ``part`` is made, and the others are zero.
    ``overlap`` lets the kernel behind start early, when x is there; ``early`` starts the shrink itself early.
    """
    assert work is None or parts == 1, "segments leave no room for other parts"
    tokens, in_features = x.shape
    n_sites, num_slots = len(factors.sites), factors.num_slots
    tiles = tiles or default_launches(Call(tokens, in_features, (), width)).shrink
    planes = triton.cdiv(in_features, tiles.depth) if work is None else tiles.splits
    make = x.new_zeros if zeroed else x.new_empty
    h = make(planes, tokens, parts * n_sites, width, dtype=torch.float32)
    sizes = (x.stride(0), in_features, num_slots, tokens, width, n_sites, *_three(factors.sites))
    constants = {"SPLITS": planes, "BLOCK_K": tiles.depth, "OVERLAP": overlap}
    options = {"num_warps": tiles.warps, **pdl(early)}
    if work is None:
        grid = (tokens, n_sites, planes * triton.cdiv(width, tiles.rows))
        constants |= {"ROWS": tiles.rows, "PARTS": parts, "PART": part}
        shrink_tokens[grid](x, factors.pool, factors.slots, factors.token_slot, h, *sizes, **constants, **options)
        return h
    row_tiles = triton.cdiv(n_sites * width, tiles.rows)
    grid = (num_segments(tokens, num_slots, work.size), row_tiles, planes)
    shrink_segments[grid](
        x, factors.pool, factors.slots, work.order, work.segments, h, *sizes, **constants, BLOCK_T=work.size,
        BLOCK_R=tiles.rows, num_stages=tiles.stages, **options,
    )  # fmt: skip
    return h


def one_plane(h: Tensor, num_sites: int) -> Tensor:
    """h [T, num_sites * width] as the one plane of [1, T, num_sites, width]; also of no tokens."""
    return h.contiguous().view(1, h.shape[0], num_sites, h.shape[1] // num_sites)


def expand(
    y: Tensor,
    h: Tensor,
    factors: Factors,
    scales: Tensor,
    work: Work | None,
    out_features: Sequence[int],
    parts: int = 1,
    tiles: Expand | None = None,
    *,
    overlap: bool = False,
) -> None:
    """y += scale * (B h), in place; h float32 [planes, T, parts * n, width].

    ``overlap``: only where the kernel ahead is the shrink of this h, itself launched with ``overlap``.
    """
    tokens, columns = y.shape
    width = h.shape[-1]
    tiles = tiles or default_launches(Call(tokens, 0, tuple(out_features), width)).expand
    repeat = 1 if work is None else tiles.repeat
    counts = [triton.cdiv(size, tiles.columns * repeat) for size in out_features]
    sizes = (y.stride(0), columns, factors.num_slots, tokens, width, len(factors.sites), *_three(counts)[:2])
    sizes = (*sizes, *_three(factors.sites), *_three(out_features))
    constants = {"PLANES": h.shape[0], "PARTS": parts, "BLOCK_R": tiles.rows, "BLOCK_O": tiles.columns}
    options = {"OVERLAP": overlap, "num_warps": tiles.warps, "num_stages": 1, **pdl(overlap)}
    if work is None:
        options |= _at_most(tiles.registers)
        expand_tokens[(tokens, sum(counts))](
            y, h, factors.pool, factors.slots, scales, factors.token_slot, *sizes, **constants, **options,
        )  # fmt: skip
        return
    grid = (num_segments(tokens, factors.num_slots, work.size), sum(counts))
    expand_segments[grid](
        y, h, factors.pool, factors.slots, scales, work.order, work.segments, *sizes, **constants, BLOCK_T=work.size,
        REPEAT=repeat, **options,
    )  # fmt: skip


def pdl(overlap: bool) -> dict[str, bool]:
    """Asked for only where it is wanted: the interpreter knows no such option."""
    return {"launch_pdl": True} if overlap else {}


def _at_most(registers: int) -> dict[str, int]:
    """A limit on a thread's registers, which the interpreter does not know."""
    return {"maxnreg": registers} if registers and torch.cuda.is_available() else {}


def _three(values: Sequence[int]) -> tuple[int, ...]:
    """Kernels take the sites of a call as three numbers."""
    return (*values, *(0 for _ in range(MAX_SITES - len(values))))


def num_segments(tokens: int, num_slots: int, size: int) -> int:
    """Segments of up to ``size`` tokens that ``tokens`` tokens of any mix of slots make at most."""
    return min(-(-tokens // size) + num_slots, tokens)


def segment_work(token_slot: Tensor, size: int) -> Work:
    """Group tokens by slot, on the device and in shapes that do not depend on the mix.

    Kernels that start early may be launched directly behind, for up to 1,024 tokens.

    Args:
        token_slot: int32 [T], -1 for no adapter.
        size: tokens of a segment at most.

    Returns:
        order: int32 [T], tokens sorted by slot.
        segments: int32 [T, 6], two tables side by side. Of a segment: slot, start in ``order``, count up to ``size``;
            count 0 is no segment, and none are behind the first `num_segments` rows. Of a place in ``order``: its
            token's slot, start and count of the segment that it lies in; count 0 for no adapter.
    """
    tokens = token_slot.shape[0]
    if tokens > _ONE_GROUPING_LAUNCH:
        return _sorted_work(token_slot, size)
    order, segments = token_slot.new_empty(tokens), token_slot.new_empty(tokens, SEGMENT_FIELDS)
    block = max(32, triton.next_power_of_2(tokens))

    def group() -> None:
        group_tokens[(1,)](token_slot, order, segments, tokens, SIZE=size, BLOCK=block, num_warps=8)

    ended_before_others(token_slot.device, group)
    return Work(order, segments, size)


def _sorted_work(token_slot: Tensor, size: int) -> Work:
    """`segment_work` for many tokens: a sort."""
    tokens = token_slot.shape[0]
    by_slot, order = token_slot.sort(stable=True)
    position = torch.arange(tokens, dtype=torch.int32, device=token_slot.device)
    first = torch.searchsorted(by_slot, by_slot, out_int32=True)
    behind = torch.searchsorted(by_slot, by_slot, right=True, out_int32=True)
    start = position - (position - first) % size
    count = torch.where(by_slot >= 0, (behind - start).clamp(max=size), 0)
    begins = (start == position) & (by_slot >= 0)
    rows = torch.stack([by_slot, start, count], dim=1)
    # Tokens that begin no segment all write the one row behind the last, which is cut off.
    target = torch.where(begins, begins.cumsum(0) - 1, tokens)
    segments = token_slot.new_zeros(tokens + 1, 3)
    segments.index_copy_(0, target, rows)
    return Work(order.to(torch.int32), torch.cat([segments[:tokens], rows], dim=1), size)
