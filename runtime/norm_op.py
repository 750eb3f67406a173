"""All-reduce, residual addition and RMSNorm as one operator: by one kernel for few tokens, one after the other else."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bdlora_compile.collectives import group_named
from bdlora_compile.runtime.all_reduce import all_reduce, way
from bdlora_compile.runtime.linear_op import is_served_by_token
from bdlora_compile.runtime.ops import lora_apply, lora_expand

if TYPE_CHECKING:
    from bdlora_compile.runtime.kernels import launch, launch_norm

KINDS = (torch.bfloat16, torch.float32)
"""What symmetric memory adds up."""
_OF_THE_NORM = 8
"""Arguments of `all_reduce_add_norm` behind x; those of LoRA follow them."""


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
    u: Tensor,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    sites: Sequence[int],
    width: int,
) -> tuple[Tensor, Tensor]:
    """`all_reduce_add_norm` of x, to which the LoRA is added before that `lora_linear_deferred` has left out.

    On GPUs the kernel may start before the one ahead of it in the stream has ended, which must not write ``pool``,
    ``slots``, ``scales`` or ``token_slot``.

    Args:
        x, residual, weight, buffer, mailbox, epsilon, one_shot, two_shot, group: as for `all_reduce_add_norm`.
        u, pool, slots, scales, token_slot, sites, width: of `lora_linear_deferred` with result x; one site.
    """
    if is_served_by_token(x):
        x = lora_apply(u, x, pool, slots, scales, token_slot, sites, width, [x.shape[-1]])
    total, normed = all_reduce_add_norm(x, residual, weight, buffer, mailbox, epsilon, one_shot, two_shot, group)
    return total, normed


@torch.library.custom_op("bdlora::all_reduce_add_norm_expand", mutates_args=())
def all_reduce_add_norm_expand(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    buffer: Tensor,
    mailbox: Tensor,
    epsilon: float,
    one_shot: int,
    two_shot: int,
    group: str,
    h: Tensor,
    pool: Tensor,
    slots: Tensor,
    scales: Tensor,
    token_slot: Tensor,
    sites: Sequence[int],
    out_features: Sequence[int],
    parts: int,
) -> tuple[Tensor, Tensor]:
    """`all_reduce_add_norm` of x, to which scale * (B h) is added before; for more than few tokens x has it already.

    On GPUs the kernel may start before the one ahead of it in the stream has ended, which may write x and h, but not
    ``pool``, ``slots``, ``scales`` or ``token_slot``.

    Args:
        x, residual, weight, buffer, mailbox, epsilon, one_shot, two_shot, group: as for `all_reduce_add_norm`.
        h: float32 [planes, T, parts, width], which sum to the h of `lora_expand`; read for few tokens alone
            (`is_served_by_token`), and there only a slot's ranks.
        pool, slots, scales, token_slot, sites, out_features, parts: as for `lora_expand` with result x; one site.
    """
    if is_served_by_token(x):
        x = lora_expand(x, h.sum(0).flatten(1), pool, slots, scales, token_slot, sites, out_features, parts)
    total, normed = all_reduce_add_norm(x, residual, weight, buffer, mailbox, epsilon, one_shot, two_shot, group)
    return total, normed


@all_reduce_add_norm.register_fake
@all_reduce_add_norm_lora.register_fake
@all_reduce_add_norm_expand.register_fake
def _(x: Tensor, *_others: object) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total)


# --- on GPUs: one kernel for few tokens -----------------------------------------------------------------------------


class _FromInput(NamedTuple):
    """LoRA that x lacks, B (A u); ``bank`` is pool, slots, scales and token_slot."""

    u: Tensor
    bank: tuple[Tensor, Tensor, Tensor, Tensor]
    sites: Sequence[int]
    width: int

    def added_to(self, x: Tensor) -> Tensor:
        """x and the LoRA."""
        return lora_apply(self.u, x, *self.bank, self.sites, self.width, [x.shape[-1]])

    def ahead(self) -> "launch_norm.Ahead":
        """The same for the kernel."""
        from bdlora_compile.runtime.kernels import launch_norm  # Triton is there on GPUs only

        u = self.u.reshape(-1, self.u.shape[-1]).contiguous()
        return launch_norm.Ahead(u, *_factors(self.bank, self.sites), self.width)


class _FromH(NamedTuple):
    """The same where h = A u is given."""

    h: Tensor
    bank: tuple[Tensor, Tensor, Tensor, Tensor]
    sites: Sequence[int]
    out_features: Sequence[int]
    parts: int

    def added_to(self, x: Tensor) -> Tensor:
        """x and the LoRA: by a launch of its own, which sums the planes of h as well."""
        from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

        out = x.clone(memory_format=torch.contiguous_format)
        rows, (factors, scales) = out.view(-1, out.shape[-1]), _factors(self.bank, self.sites)
        launch.expand(rows, self.h.contiguous(), factors, scales, None, self.out_features, self.parts)
        return out

    def ahead(self) -> "launch_norm.Given":
        """The same for the kernel."""
        from bdlora_compile.runtime.kernels import launch_norm  # Triton is there on GPUs only

        (columns,) = self.out_features
        return launch_norm.Given(self.h.contiguous(), *_factors(self.bank, self.sites), columns, self.parts)


def _factors(bank: tuple[Tensor, Tensor, Tensor, Tensor], sites: Sequence[int]) -> "tuple[launch.Factors, Tensor]":
    """(where the factors lie, the scales)."""
    from bdlora_compile.runtime.kernels import launch  # Triton is there on GPUs only

    pool, slots, scales, token_slot = bank
    return launch.Factors(pool, slots, token_slot, sites), scales


@all_reduce_add_norm.register_kernel("cuda")
def _(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _by_kernels(None, x, *others)


@all_reduce_add_norm_lora.register_kernel("cuda")
def _(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    u, *bank, sites, width = others[_OF_THE_NORM:]
    missing = _FromInput(u, (*bank,), sites, width) if is_served_by_token(x) else None
    return _by_kernels(missing, x, *others[:_OF_THE_NORM])


@all_reduce_add_norm_expand.register_kernel("cuda")
def _(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    h, *bank, sites, out_features, parts = others[_OF_THE_NORM:]
    missing = _FromH(h, (*bank,), sites, out_features, parts) if is_served_by_token(x) else None
    return _by_kernels(missing, x, *others[:_OF_THE_NORM])


def _by_kernels(
    missing: _FromInput | _FromH | None,
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
    """(s, normed) on a GPU, with the LoRA that x lacks."""
    from bdlora_compile.runtime.kernels import launch_norm  # Triton is there on GPUs only

    members: Any = group_named(group)
    rows, columns, size = math.prod(x.shape[:-1]), x.shape[-1], x.element_size()
    goes_one_way = way(x.numel() * size, one_shot, two_shot, members.size()) == "one-shot"
    exchanges = goes_one_way and launch_norm.can_exchange(rows, columns, size, members.size())
    if missing is not None and not exchanges:
        x = missing.added_to(x)
    own, carried = (value.reshape(-1, columns).contiguous() for value in (x, residual))
    if exchanges:
        ahead = None if missing is None else missing.ahead()
        values = (own, carried, weight, mailbox, epsilon, members.rank(), members.size())
        total, normed = launch_norm.reduce_add_norm(*values, ahead)
    else:
        reduced = all_reduce(own, buffer, one_shot, two_shot, group)
        total, normed = launch_norm.add_norm(reduced, carried, weight, epsilon)
    return total.view(x.shape), normed.view(x.shape)
