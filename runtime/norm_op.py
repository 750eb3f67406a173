"""All-reduce, residual addition and RMSNorm as one operator: by one kernel for few tokens, one after the other else."""

import math
from typing import Any

import torch
from torch import Tensor

from bdlora_compile.collectives import group_named
from bdlora_compile.runtime.all_reduce import all_reduce
from bdlora_compile.runtime.linear_op import missing_from, with_delta

KINDS = (torch.bfloat16, torch.float32)
"""What symmetric memory adds up."""


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
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """s = residual + the sum of x over the ranks, and RMSNorm(s) * weight.

    Args:
        x, residual: [..., D], bf16 or float32; all ranks' x have one shape, and residual is the same on all.
        weight: [D].
        buffer: as for `all_reduce`. mailbox: int64, see `kernels/norm.py`. Nothing else reads either.
        epsilon: added to the mean of squares.
        one_shot, two_shot: bytes of the largest x that goes each way where sum and norm stay apart; larger ones go
            through the process group.
        group: name of the process group.
        delta: what this rank's x lacks, from `linear_op.lora_linear_beside`.

    Returns:
        (s, normed), new contiguous tensors like x, the same bits on all ranks. Rounded to x's dtype are: the sum over
        the ranks, s, s over its root mean square, and its product with the weight.
    """
    reduced = all_reduce(with_delta(x, delta), buffer, one_shot, two_shot, group)
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
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from bdlora_compile.runtime.kernels import launch_norm  # Triton is there on GPUs only

    members: Any = group_named(group)
    rows, columns, size = math.prod(x.shape[:-1]), x.shape[-1], x.element_size()
    # Where one-shot pays at all the kernel does, wherever it has room: it reads more at a time (docs/performance.md).
    exchanges = one_shot > 0 and launch_norm.can_exchange(rows, columns, size, members.size())
    own, carried = (value.reshape(-1, columns).contiguous() for value in (x, residual))
    if exchanges:
        missing = missing_from(x, delta)
        values = (own, carried, weight, mailbox, epsilon, members.rank(), members.size())
        total, normed = launch_norm.reduce_add_norm(*values, missing)
    else:
        reduced = all_reduce(with_delta(own, delta), buffer, one_shot, two_shot, group)
        total, normed = launch_norm.add_norm(reduced, carried, weight, epsilon)
    return total.view(x.shape), normed.view(x.shape)
