"""LoRA as graph operators: one pool for all adapters and sites, a slot table, and a slot for each token.

    lora_shrink   h = A x                      x [..., D] -> h [T, n * width]
    lora_expand   y' = y + scale * (B h)       y [..., O], h [T, parts * n * width] -> y' [..., O]

One call serves the n sites that read one x and whose outputs lie side by side in y (q, k and v; gate and up; or one).

Legend: T tokens (all leading dims of x together), D/O columns of x and y on this rank, S slots, r local rank of a slot,
c blocks. A slot's factors at a site are A [r, D/c] and transposed B [r, O_loc/c] with the blocks stacked on r, both
row-major in one flat pool; `SlotField` names the columns of the slot table. Tokens of slot -1 have no adapter.

The plain PyTorch implementations are loops over the slots in use: they state what the Triton kernels compute, and serve
where there are no kernels (CPUs, float32).
"""

import math
from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT, SEGMENT_FIELDS, segment_tokens

if TYPE_CHECKING:
    from bdlora_compile.runtime.kernels.launch import Work


class SlotField(IntEnum):
    """Columns of the slot table ``slots`` int64 [sites, S, 7]; offsets and sizes are in elements."""

    A_OFFSET = 0
    B_OFFSET = 1
    A_RANK = 2
    B_RANK = 3
    A_BLOCKS = 4
    B_BLOCKS = 5
    OUT_START = 6


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products are summed: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@torch.library.custom_op("bdlora::lora_shrink", mutates_args=())
def lora_shrink(x: Tensor, pool: Tensor, slots: Tensor, token_slot: Tensor, sites: Sequence[int], width: int) -> Tensor:
    """h = A x, each token with the A of its slot.

    Args:
        x: [..., D] activations; T tokens in all.
        pool: flat pool of factors, same dtype as x.
        slots: int64 [sites, S, 7], see `SlotField`.
        token_slot: int32 [at least T]; the first T entries give each token's slot, -1 for none.
        sites: rows of ``slots``, n of them.
        width: columns of h for each site; no slot has a larger local rank.

    Returns:
        [T, n * width], float32 (float64 for float64 x), site after site; columns past a slot's rank and tokens of
        slot -1 are zero.
    """
    tokens = x.reshape(-1, x.shape[-1])
    h = tokens.new_zeros(tokens.shape[0], len(sites), width, dtype=accumulate_dtype(x.dtype))
    for slot, rows in _slots_in_use(token_slot[: tokens.shape[0]]):
        for position, site in enumerate(sites):
            fields = slots[site, slot].tolist()
            rank, blocks = fields[SlotField.A_RANK], fields[SlotField.A_BLOCKS]
            if rank == 0:
                continue
            a = _factor(pool, fields[SlotField.A_OFFSET], rank, blocks, x.shape[-1] // blocks, h.dtype)
            x_blocks = tokens[rows].to(h.dtype).unflatten(-1, (blocks, -1))
            h[rows, position, :rank] = torch.einsum("tbd,brd->tbr", x_blocks, a).flatten(1)
    return h.flatten(1)


@lora_shrink.register_fake
def _(x: Tensor, pool: Tensor, slots: Tensor, token_slot: Tensor, sites: Sequence[int], width: int) -> Tensor:
    # Not torch.Size.numel, which would fix the batch and the length to the numbers of this call.
    return x.new_empty(math.prod(x.shape[:-1]), len(sites) * width, dtype=accumulate_dtype(x.dtype))


@torch.library.custom_op("bdlora::lora_expand", mutates_args=())
def lora_expand(
    y: Tensor,
    h: Tensor,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    sites: Sequence[int],
    out_features: Sequence[int],
    parts: int,
) -> Tensor:
    """y' = y + scale * (B h), each token with the B and the scale of its slot.

    Args:
        y: [..., O] output of the base layer; T tokens in all.
        h: [T, parts * n * width] from `lora_shrink`, gathered from ``parts`` ranks where ``parts`` is above 1: each
            part holds an equal share of a slot's rank at the left of each site's columns.
        pool, slots, token_slot, sites: as for `lora_shrink`.
        scales: float32 [sites, S].
        out_features: for each site the columns that B writes. A site's columns of y begin where those of the sites
            before it end, plus the slot's OUT_START; columns past O are dropped.
        parts: number of ranks whose shares of h lie side by side.

    Returns:
        A new tensor like y; the sum is taken in h's dtype and rounded once.
    """
    out = y.clone(memory_format=torch.contiguous_format)
    tokens = out.view(-1, out.shape[-1])
    shares = h.unflatten(-1, (parts, len(sites), -1))
    starts = [0, *accumulate(out_features)]
    for slot, rows in _slots_in_use(token_slot[: tokens.shape[0]]):
        for position, (site, size) in enumerate(zip(sites, out_features, strict=True)):
            fields = slots[site, slot].tolist()
            rank, blocks = fields[SlotField.B_RANK], fields[SlotField.B_BLOCKS]
            if rank == 0:
                continue
            b = _factor(pool, fields[SlotField.B_OFFSET], rank, blocks, size // blocks, h.dtype)
            h_blocks = shares[rows, :, position, : rank // parts].flatten(1).unflatten(-1, (blocks, -1))
            delta = torch.einsum("tbr,bro->tbo", h_blocks, b).flatten(1) * scales[site, slot].to(h.dtype)
            start = starts[position] + fields[SlotField.OUT_START]
            columns = slice(start, min(start + size, tokens.shape[1]))
            written = delta[:, : columns.stop - columns.start]
            tokens[rows, columns] = (tokens[rows, columns].to(h.dtype) + written).to(y.dtype)
    return out


@lora_expand.register_fake
def _(y: Tensor, *_: object) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.custom_op("bdlora::lora_apply", mutates_args=())
def lora_apply(
    x: Tensor,
    y: Tensor,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    sites: Sequence[int],
    width: int,
    out_features: Sequence[int],
) -> Tensor:
    """y' = y + scale * B (A x): `lora_shrink` and `lora_expand` with nothing between them. Arguments as there."""
    out = y.clone(memory_format=torch.contiguous_format)
    order, segments = lora_work(x, token_slot)
    lora_apply_(x, out, pool, slots, scales, token_slot, order, segments, sites, width, out_features)
    return out


@lora_apply.register_fake
def _(x: Tensor, y: Tensor, *_: object) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.custom_op("bdlora::lora_apply_", mutates_args=("y",))
def lora_apply_(
    x: Tensor,
    y: Tensor,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    order: Tensor,
    segments: Tensor,
    sites: Sequence[int],
    width: int,
    out_features: Sequence[int],
) -> None:
    """y += scale * B (A x), in place.

    On GPUs the kernel may start before the one ahead of it in the stream has ended: that one may write x and y, as a
    base product does, but not ``pool``, ``slots``, ``scales`` or ``token_slot``.

    Args:
        x, y, pool, slots, scales, token_slot, sites, width, out_features: as for `lora_apply`.
        order, segments: from `lora_work`.
    """
    h = lora_shrink(x, pool, slots, token_slot, sites, width)
    y.copy_(lora_expand(y, h, pool, slots, scales, token_slot, sites, out_features, 1))


@lora_apply_.register_fake
def _(*_: object) -> None:
    return None


@torch.library.custom_op("bdlora::lora_work", mutates_args=())
def lora_work(x: Tensor, token_slot: Tensor) -> tuple[Tensor, Tensor]:
    """How a forward's tokens are grouped by slot; made once and read by every `lora_apply_` of the forward.

    Returns:
        order: int32 [T], tokens sorted by slot.
        segments: int32 [T, 6], see `kernels.launch.segment_work`. Both hold nothing where T is so small that no kernel
        wants tokens grouped, and on devices without kernels.
    """
    return _room_for_work(math.prod(x.shape[:-1]), token_slot)


@lora_work.register_fake
def _(x: Tensor, token_slot: Tensor) -> tuple[Tensor, Tensor]:
    return _room_for_work(math.prod(x.shape[:-1]), token_slot)


def _room_for_work(tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_empty(tokens), like.new_empty(tokens, SEGMENT_FIELDS)


# --- on GPUs: the same by Triton kernels, for bf16 and fp16 ---------------------------------------------------------


@lora_work.register_kernel("cuda")
def _(x: Tensor, token_slot: Tensor) -> tuple[Tensor, Tensor]:
    tokens = math.prod(x.shape[:-1])
    if not has_kernels(x.dtype) or not segment_tokens(tokens):
        return _room_for_work(tokens, token_slot)
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    launch.require_contiguous(token_slot=token_slot)
    work = _grouped(tokens, token_slot)
    return work.order, work.segments


@lora_apply_.register_kernel("cuda")
def _(
    x: Tensor,
    y: Tensor,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    order: Tensor,
    segments: Tensor,
    sites: Sequence[int],
    width: int,
    out_features: Sequence[int],
) -> None:
    if not has_kernels(x.dtype):
        return lora_apply_._init_fn(x, y, pool, slots, scales, token_slot, order, segments, sites, width, out_features)
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    rows, out = launch.rows_of(x), y.view(-1, y.shape[-1])
    work = launch.work_for(rows.shape[0], order, segments)
    launch.apply_(rows, out, launch.Factors.of(pool, slots, token_slot, sites), scales, work, width, out_features)


@lora_shrink.register_kernel("cuda")
def _(x: Tensor, pool: Tensor, slots: Tensor, token_slot: Tensor, sites: Sequence[int], width: int) -> Tensor:
    if not has_kernels(x.dtype):
        return lora_shrink._init_fn(x, pool, slots, token_slot, sites, width)
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    rows = launch.rows_of(x)
    work = _own_work(rows.shape[0], token_slot)
    # A collective follows: what no slot writes must be zero.
    planes = launch.shrink(rows, launch.Factors.of(pool, slots, token_slot, sites), work, width, zeroed=True)
    return planes.sum(0).flatten(1)


@lora_expand.register_kernel("cuda")
def _(
    y: Tensor,
    h: Tensor,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    sites: Sequence[int],
    out_features: Sequence[int],
    parts: int,
) -> Tensor:
    if not has_kernels(y.dtype):
        return lora_expand._init_fn(y, h, pool, slots, scales, token_slot, sites, out_features, parts)
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    out = y.clone(memory_format=torch.contiguous_format)
    rows = out.view(-1, out.shape[-1])
    work = _own_work(rows.shape[0], token_slot)
    planes = launch.one_plane(h, parts * len(sites))
    launch.expand(rows, planes, launch.Factors.of(pool, slots, token_slot, sites), scales, work, out_features, parts)
    return out


def has_kernels(dtype: torch.dtype) -> bool:
    """Whether there are Triton kernels for factors and activations of a dtype."""
    return dtype in (torch.bfloat16, torch.float16)


def _own_work(tokens: int, token_slot: Tensor) -> "Work | None":
    """The tokens grouped by slot; None where kernels work token by token."""
    return _grouped(tokens, token_slot) if tokens > BY_TOKEN_LIMIT else None


def _grouped(tokens: int, token_slot: Tensor) -> "Work":
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    return launch.segment_work(token_slot[:tokens], segment_tokens(tokens))


# --- plain PyTorch --------------------------------------------------------------------------------------------------


def _slots_in_use(token_slot: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each slot that some token uses, with those tokens' indices."""
    for slot in token_slot.unique().tolist():
        if slot >= 0:
            yield slot, (token_slot == slot).nonzero().squeeze(-1)


def _factor(pool: Tensor, offset: int, rank: int, blocks: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A factor of the pool as [blocks, rank / blocks, columns]."""
    flat = pool[offset : offset + rank * columns]
    return flat.view(blocks, rank // blocks, columns).to(dtype)
