"""All-reduce, residual addition and RMSNorm as one operator, and one that makes LoRA's h too: by one kernel for few
tokens, one after the other else.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bdlora_compile.collectives import group_named
from bdlora_compile.runtime.all_reduce import all_reduce, way
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.runtime.ops import has_kernels, lora_shrink

if TYPE_CHECKING:
    from bdlora_compile.runtime.kernels import launch

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


@torch.library.custom_op("bdlora::all_reduce_add_norm_shrink", mutates_args=())
def all_reduce_add_norm_shrink(
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
    token_slot: Tensor,
    sites: Sequence[int],
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`all_reduce_add_norm`, and LoRA's h = A times the norm, each token with the A of its slot.

    On GPUs the kernel may start before the one ahead of it in the stream has ended, which must not write ``pool``,
    ``slots`` or ``token_slot``.

    Args:
        x, residual, weight, buffer, mailbox, epsilon, one_shot, two_shot, group: as for `all_reduce_add_norm`.
        pool, slots, token_slot, sites, width: as for `lora_shrink`.

    Returns:
        (s, normed, h): h float32 [PLANES, T, n, width]; its planes' sum is `lora_shrink` of normed, but that kernels
        take it of the norm before it is rounded. On GPUs what no slot writes is undefined, and above
        `BY_TOKEN_LIMIT` tokens all of h.
    """
    total, normed = all_reduce_add_norm(x, residual, weight, buffer, mailbox, epsilon, one_shot, two_shot, group)
    h = _new_h(x, sites, width).zero_()
    h[0] = lora_shrink(normed, pool, slots, token_slot, sites, width).view(h.shape[1:])
    return total, normed, h


@all_reduce_add_norm_shrink.register_fake
def _(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    sites, width = others[-2:]
    return total, torch.empty_like(total), _new_h(x, sites, width)


@all_reduce_add_norm_shrink.register_kernel("cuda")
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
    token_slot: Tensor,
    sites: Sequence[int],
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    is_wanted, factors = math.prod(x.shape[:-1]) <= BY_TOKEN_LIMIT, None
    if is_wanted and has_kernels(x.dtype):
        factors = launch.Factors(pool, slots, token_slot, sites)
    total, normed, h = _by_kernels(
        x, residual, weight, buffer, mailbox, epsilon, one_shot, two_shot, group, factors, width
    )
    if h is None:
        h = _new_h(x, sites, width)
        if is_wanted:
            h.zero_()[0] = lora_shrink(normed, pool, slots, token_slot, sites, width).view(h.shape[1:])
    return total, normed, h


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
    factors: "launch.Factors | None" = None,
    width: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(s, normed, h) on a GPU; h only where there are factors: of up to `BY_TOKEN_LIMIT` tokens."""
    from bdlora_compile.runtime.kernels import launch_norm  # Triton is there on GPUs only

    members: Any = group_named(group)
    own, carried = (value.reshape(-1, x.shape[-1]).contiguous() for value in (x, residual))
    rows, columns, size = math.prod(x.shape[:-1]), x.shape[-1], x.element_size()
    goes_one_way = way(x.numel() * size, one_shot, two_shot, members.size()) == "one-shot"
    h = None
    if goes_one_way and launch_norm.can_exchange(rows, columns, size, members.size()):
        values = (own, carried, weight, mailbox, epsilon, members.rank(), members.size())
        if factors is None:
            total, normed = launch_norm.reduce_add_norm(*values)
        else:
            total, normed, h = launch_norm.reduce_add_norm_shrink(*values, factors, width)
    else:
        reduced = all_reduce(own, buffer, one_shot, two_shot, group)
        total, normed = launch_norm.add_norm(reduced, carried, weight, epsilon)
        h = None if factors is None else launch_norm.h_of(normed, factors, width)
    return total.view(x.shape), normed.view(x.shape), h


def _new_h(x: Tensor, sites: Sequence[int], width: int) -> Tensor:
    # Not torch.Size.numel, which would fix the batch and the length to the numbers of this call.
    return x.new_empty(PLANES, math.prod(x.shape[:-1]), len(sites), width, dtype=torch.float32)
