"""The two halves of a LoRA path with a collective between them, as a compiled forward on a GPU runs them.

For few tokens all of it may run beside the base product.

They differ from `ops.lora_shrink` and `ops.lora_expand`: tokens are grouped once a forward for all of them, h holds
anything where no slot writes (no expand reads that), and y is added to in place.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bdlora_compile.runtime.all_reduce import all_reduce
from bdlora_compile.runtime.kernels.tiles import TOGETHER_BEHIND_EXCHANGE, can_overlap, one_plane_shrink
from bdlora_compile.runtime.linear_op import Lora, as_delta, has_delta, product_and_lora, room_for_delta
from bdlora_compile.runtime.ops import accumulate_dtype, has_kernels, lora_expand, lora_shrink

if TYPE_CHECKING:
    from bdlora_compile.runtime.kernels import launch


@torch.library.custom_op("bdlora::lora_shrink_grouped", mutates_args=())
def lora_shrink_grouped(
    x: Tensor,
    pool: Tensor,
    slots: Tensor,
    token_slot: Tensor,
    order: Tensor,
    segments: Tensor,
    sites: Sequence[int],
    width: int,
    parts: int = 1,
    part: int = 0,
) -> Tensor:
    """h = A x, each token with the A of its slot.

    Args:
        x, pool, slots, token_slot, sites, width: as for `ops.lora_shrink`.
        order, segments: from `ops.lora_work`.
        parts, part: make room for the shares of ``parts`` ranks side by side, of which this is number ``part``, and
            the others are zero: their sum over the ranks is all of h.

    Returns:
        [T, parts * n * width], float32. Columns past a slot's rank and tokens of slot -1 hold anything.
    """
    return _among_parts(lora_shrink(x, pool, slots, token_slot, sites, width), parts, part)


@lora_shrink_grouped.register_fake
def _(
    x: Tensor,
    pool: Tensor,
    slots: Tensor,
    token_slot: Tensor,
    order: Tensor,
    segments: Tensor,
    sites: Sequence[int],
    width: int,
    parts: int = 1,
    part: int = 0,
) -> Tensor:
    return x.new_empty(math.prod(x.shape[:-1]), parts * len(sites) * width, dtype=accumulate_dtype(x.dtype))


@lora_shrink_grouped.register_kernel("cuda")
def shrink_by_kernels(
    x: Tensor,
    pool: Tensor,
    slots: Tensor,
    token_slot: Tensor,
    order: Tensor,
    segments: Tensor,
    sites: Sequence[int],
    width: int,
    parts: int = 1,
    part: int = 0,
) -> Tensor:
    """`lora_shrink_grouped` by the Triton kernels, where there are any for the dtype; by token in one launch."""
    if not has_kernels(x.dtype):
        return _among_parts(lora_shrink(x, pool, slots, token_slot, sites, width), parts, part)
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    rows = launch.rows_of(x)
    work = launch.work_for(rows.shape[0], order, segments)
    factors = launch.Factors.of(pool, slots, token_slot, sites)
    if work is None:
        return _shrink_by_token(rows, factors, width, parts, part, overlap=False)
    planes = launch.shrink(rows, factors, work, width)
    return _among_parts((planes[0] if planes.shape[0] == 1 else planes.sum(0)).flatten(1), parts, part)


def _shrink_by_token(
    rows: Tensor, factors: "launch.Factors", width: int, parts: int, part: int, *, overlap: bool
) -> Tensor:
    """In one launch. ``overlap`` lets it start while the kernel that writes the rows ends."""
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    tiles = one_plane_shrink(rows.shape[1], width)
    h = launch.shrink(rows, factors, None, width, tiles, overlap=overlap, early=overlap, parts=parts, part=part)
    return h[0].flatten(1)


def _among_parts(h: Tensor, parts: int, part: int) -> Tensor:
    """h [T, any], with zeros where other parts are."""
    return torch.nn.functional.pad(h, (part * h.shape[1], (parts - 1 - part) * h.shape[1])) if parts > 1 else h


@torch.library.custom_op("bdlora::lora_linear_bridged", mutates_args=())
def lora_linear_bridged(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    order: Tensor,
    segments: Tensor,
    sites: Sequence[int],
    width: int,
    out_features: Sequence[int],
    parts: int,
    part: int,
    buffer: Tensor,
    one_shot: int,
    two_shot: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    """A base product with a LoRA path that has an all-reduce between its factors: beside it for few tokens.

    Args:
        x: [..., D]. weight: W [O, D]. bias: [O].
        pool, slots, scales, token_slot, order, segments, sites, width, out_features: as for `linear_op.lora_linear`;
            one site may write fewer columns than W has rows.
        parts, part: as for `lora_shrink_grouped`, whose result is summed over the ranks, and for `ops.lora_expand`.
        buffer, one_shot, two_shot, group: as for `all_reduce.all_reduce`.

    Returns:
        (y, delta) as `linear_op.lora_linear_beside`.
    """
    h = lora_shrink_grouped._init_fn(x, pool, slots, token_slot, order, segments, sites, width, parts, part)
    h = all_reduce(h, buffer, one_shot, two_shot, group)
    y, bank = torch.nn.functional.linear(x, weight, bias), (pool, slots, scales, token_slot)
    if not has_delta(x):
        return lora_expand(y, h, *bank, sites, out_features, parts), room_for_delta(x, weight)
    return y, as_delta(lora_expand(torch.zeros_like(y), h, *bank, sites, out_features, parts))


@lora_linear_bridged.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), room_for_delta(x, weight)


@lora_linear_bridged.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    lora, (parts, part, *transport) = Lora(*others[: len(Lora._fields)]), others[len(Lora._fields) :]
    pool, slots, scales, token_slot, order, segments, sites, width, out_features = lora
    if not has_delta(x):
        h = shrink_by_kernels(x, pool, slots, token_slot, order, segments, sites, width, parts, part)
        h, y = all_reduce._init_fn(h, *transport), torch.nn.functional.linear(x, weight, bias)
        expand_by_kernels(y, h, pool, slots, scales, token_slot, order, segments, sites, out_features, parts)
        return y, room_for_delta(x, weight)
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    rows, factors = launch.rows_of(x), launch.Factors.of(pool, slots, token_slot, sites)

    def exchanged() -> Tensor:
        h = _shrink_by_token(rows, factors, width, parts, part, overlap=can_overlap())
        return launch.one_plane(all_reduce._init_fn(h, *transport), parts * len(sites))

    work = launch.work_beside(rows.shape[0], order, segments)
    path = launch.Beside(factors, scales, out_features, parts, work, TOGETHER_BEHIND_EXCHANGE)
    return product_and_lora(x, weight, bias, path, exchanged)


@torch.library.custom_op("bdlora::lora_expand_", mutates_args=("y",))
def lora_expand_(
    y: Tensor,
    h: Tensor,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    order: Tensor,
    segments: Tensor,
    sites: Sequence[int],
    out_features: Sequence[int],
    parts: int,
) -> None:
    """y += scale * (B h), in place.

    Args:
        y, h, pool, slots, scales, token_slot, sites, out_features, parts: as for `ops.lora_expand`.
        order, segments: from `ops.lora_work`.
    """
    y.copy_(lora_expand(y, h, pool, slots, scales, token_slot, sites, out_features, parts))


@lora_expand_.register_fake
def _(y: Tensor, *_: object) -> None:
    return None


@lora_expand_.register_kernel("cuda")
def expand_by_kernels(
    y: Tensor,
    h: Tensor,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    order: Tensor,
    segments: Tensor,
    sites: Sequence[int],
    out_features: Sequence[int],
    parts: int,
) -> None:
    """`lora_expand_` by the Triton kernels, where there are any for the dtype."""
    if not has_kernels(y.dtype):
        y.copy_(lora_expand(y, h, pool, slots, scales, token_slot, sites, out_features, parts))
        return
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    rows = y.view(-1, y.shape[-1])
    work = launch.work_for(rows.shape[0], order, segments)
    planes = launch.one_plane(h, parts * len(sites))
    launch.expand(rows, planes, launch.Factors.of(pool, slots, token_slot, sites), scales, work, out_features, parts)
