"""All-reduce, residual addition and RMSNorm as one operator, and one with LoRA on both sides of them: by one kernel for
few tokens, one after the other else.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bdlora_compile.collectives import group_named
from bdlora_compile.runtime.all_reduce import all_reduce, way
from bdlora_compile.runtime.linear_op import is_served_by_token
from bdlora_compile.runtime.ops import has_kernels, lora_apply_, lora_shrink, lora_work

if TYPE_CHECKING:
    from bdlora_compile.runtime.kernels import launch_norm

KINDS = (torch.bfloat16, torch.float32)
"""What symmetric memory adds up."""

PLANES = 8
"""Of h, as `kernels/norm.py` has them (Triton is there on GPUs only)."""


@torch.library.custom_op("bdlora::all_reduce_add_norm", mutates_args=())
def all_reduce_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    buffer: Tensor,
    mailbox: Tensor,
    epsilon: float,
    one_shot: int,
    two_shot: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    """s = residual + the sum of x over the ranks, and RMSNorm(s) * weight.

    Args:
        x, residual: [..., D], bf16 or float32; all ranks' x have one shape, and residual is the same on all.
        weight: [D].
        buffer: as for `all_reduce`. mailbox: int64, see `kernels/norm.py`. Nothing else reads either.
        epsilon: added to the mean of squares.
        one_shot, two_shot: bytes of the largest x that goes each way; larger ones go through the process group.
        group: name of the process group.

    Returns:
        (s, normed), new contiguous tensors like x, the same bits on all ranks. Rounded to x's dtype are: the sum over
        the ranks, s, s over its root mean square, and its product with the weight.
    """
    reduced = all_reduce(x, buffer, one_shot, two_shot, group)
    total = residual + reduced
    exact = total.float()
    scaled = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)
    return total, weight * scaled.to(x.dtype)


@all_reduce_add_norm.register_fake
def _(x: Tensor, *_others: object) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total)


@all_reduce_add_norm.register_kernel("cuda")
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    buffer: Tensor,
    mailbox: Tensor,
    epsilon: float,
    one_shot: int,
    two_shot: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    total, normed, _ = _by_kernels(x, residual, weight, buffer, mailbox, epsilon, one_shot, two_shot, group)
    return total, normed


@torch.library.custom_op("bdlora::all_reduce_add_norm_lora", mutates_args=())
def all_reduce_add_norm_lora(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    buffer: Tensor,
    mailbox: Tensor,
    epsilon: float,
    one_shot: int,
    two_shot: int,
    group: str,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    sites: Sequence[int],
    width: int,
    before: Tensor | None,
    site_before: int,
    width_before: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`all_reduce_add_norm` with LoRA on both sides of it, each token with the factors of its slot.

    On GPUs the kernel may start before the one ahead of it in the stream has ended, which must not write ``pool``,
    ``slots``, ``scales`` or ``token_slot``.

    Args:
        x, residual, weight, buffer, mailbox, epsilon, one_shot, two_shot, group: as for `all_reduce_add_norm`.
        pool, slots, scales, token_slot: as for `lora_apply`.
        sites, width: of the paths that read the norm, none or up to three, as for `lora_shrink`.
        before, site_before, width_before: [..., any columns], and a row of ``slots``: where x is what
            `lora_linear_deferred` made of it there; its LoRA is added here then. None: there is nothing to add.

    Returns:
        (s, normed, h): h float32 [PLANES, T, n, width]; its planes' sum is `lora_shrink` of normed, but that kernels
        take it of the norm before it is rounded. On GPUs what no slot writes is undefined, and above
        `BY_TOKEN_LIMIT` tokens all of h.
    """
    bank = (pool, slots, scales, token_slot)
    whole = _with_lora(x, bank, before, site_before, width_before)
    total, normed = all_reduce_add_norm(whole, residual, weight, buffer, mailbox, epsilon, one_shot, two_shot, group)
    h = _new_h(x, sites, width).zero_()
    if sites:
        h[0] = lora_shrink(normed, pool, slots, token_slot, sites, width).view(h.shape[1:])
    return total, normed, h


@all_reduce_add_norm_lora.register_fake
def _(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    sites, width = others[12:14]
    return total, torch.empty_like(total), _new_h(x, sites, width)


@all_reduce_add_norm_lora.register_kernel("cuda")
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    buffer: Tensor,
    mailbox: Tensor,
    epsilon: float,
    one_shot: int,
    two_shot: int,
    group: str,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    sites: Sequence[int],
    width: int,
    before: Tensor | None,
    site_before: int,
    width_before: int,
) -> tuple[Tensor, Tensor, Tensor]:
    exchange = (buffer, mailbox, epsilon, one_shot, two_shot, group)
    if not is_served_by_token(x):
        # Nothing was deferred, and nobody reads h, or it is made by the plain operator.
        total, normed, _ = _by_kernels(x, residual, weight, *exchange)
        h = _new_h(x, sites, width)
        if sites and not has_kernels(x.dtype):
            h.zero_()[0] = lora_shrink(normed, pool, slots, token_slot, sites, width).view(h.shape[1:])
        return total, normed, h
    from bdlora_compile.runtime.kernels import launch, launch_norm  # Triton is there on GPUs only

    behind = launch.Factors(pool, slots, token_slot, sites)
    if _exchanges(x, one_shot, two_shot, group):
        ahead = None
        if before is not None:
            ahead = launch_norm.Before(before.reshape(-1, before.shape[-1]), site_before, width_before)
        lora = launch_norm.Lora(behind, width, scales, ahead)
        total, normed, made = _by_kernels(x, residual, weight, *exchange, lora)
        assert made is not None, "asked for"
        return total, normed, made
    whole = _with_lora(x, (pool, slots, scales, token_slot), before, site_before, width_before)
    total, normed, _ = _by_kernels(whole, residual, weight, *exchange)
    rows = normed.view(-1, x.shape[-1])
    return total, normed, launch_norm.h_of(rows, behind, width) if sites else _new_h(x, sites, width)


def _by_kernels(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    buffer: Tensor,
    mailbox: Tensor,
    epsilon: float,
    one_shot: int,
    two_shot: int,
    group: str,
    lora: "launch_norm.Lora | None" = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(s, normed, h) on a GPU; with ``lora`` only where `_exchanges`."""
    from bdlora_compile.runtime.kernels import launch_norm  # Triton is there on GPUs only

    members: Any = group_named(group)
    own, carried = (value.reshape(-1, x.shape[-1]).contiguous() for value in (x, residual))
    h = None
    if _exchanges(x, one_shot, two_shot, group):
        values = (own, carried, weight, mailbox, epsilon, members.rank(), members.size())
        if lora is None:
            total, normed = launch_norm.reduce_add_norm(*values)
        else:
            total, normed, h = launch_norm.reduce_add_norm_lora(*values, lora)
    else:
        reduced = all_reduce(own, buffer, one_shot, two_shot, group)
        total, normed = launch_norm.add_norm(reduced, carried, weight, epsilon)
    return total.view(x.shape), normed.view(x.shape), h


def _exchanges(x: Tensor, one_shot: int, two_shot: int, group: str) -> bool:
    """Whether one kernel can do the sum over the ranks and the norm."""
    from bdlora_compile.runtime.kernels import launch_norm  # Triton is there on GPUs only

    rows, columns, size, ranks = math.prod(x.shape[:-1]), x.shape[-1], x.element_size(), group_named(group).size()
    goes_one_way = way(rows * columns * size, one_shot, two_shot, ranks) == "one-shot"
    return goes_one_way and launch_norm.can_exchange(rows, columns, size, ranks)


def _with_lora(x: Tensor, bank: tuple[Tensor, ...], before: Tensor | None, site: int, width: int) -> Tensor:
    """x and the LoRA that was deferred; ``bank`` is pool, slots, scales and token_slot."""
    if before is None or not is_served_by_token(x):
        return x
    whole, (order, segments) = x.clone(memory_format=torch.contiguous_format), lora_work(x, bank[-1])
    lora_apply_(before, whole, *bank, order, segments, [site], width, [x.shape[-1]])
    return whole


def _new_h(x: Tensor, sites: Sequence[int], width: int) -> Tensor:
    # Not torch.Size.numel, which would fix the batch and the length to the numbers of this call.
    return x.new_empty(PLANES, math.prod(x.shape[:-1]), len(sites), width, dtype=torch.float32)
