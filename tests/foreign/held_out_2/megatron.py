"""Region functions, parallel linears stored [out, in], and one adapter class that wraps any of them.

Activations are [S * B, D]. The adapter is itself made of two parallel linears: `linear_in` always returns the whole
`A x` (by a gather or by a sum, as the wrapped layer's input is whole or parallel), `linear_out` is always column
parallel.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign.held_out.weights import Declare, Weights, lora_linear

SOFTCAP = 0.5


def copy_to_region(x: Tensor) -> Tensor:
    """Marks where a replicated tensor enters the parallel region; without autograd it does nothing."""
    return x


def gather_from_region(x: Tensor, size: int) -> Tensor:
    """[T, d] of each rank to [T, N * d]; the collective stacks the ranks along tokens."""
    tokens, width = x.shape
    world = torch.empty((size * tokens, width), dtype=x.dtype, device=x.device)
    dist.all_gather_into_tensor(world, x.contiguous(), group=dist.group.WORLD)
    return torch.cat(torch.chunk(world, size, dim=0), dim=-1).contiguous()


def reduce_from_region(x: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    dist.all_reduce(x, op=dist.ReduceOp.SUM, group=dist.group.WORLD)
    return x


class ParallelLinear(nn.Module):
    """A rank's part [out, in] of a linear layer."""

    def __init__(self, weight: Tensor, rank: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
        self.rank = rank
        self.size = size


class ColumnParallelLinear(ParallelLinear):
    """Split along the output; takes the whole of `x`."""

    def __init__(self, whole: Tensor, rank: int, size: int, gather_output: bool = False) -> None:
        super().__init__(torch.chunk(whole, size, dim=0)[rank], rank, size)
        self.gather_output = gather_output

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] to [T, out / N], or to [T, out] if gathered."""
        out = torch.matmul(copy_to_region(x), self.weight.t())
        return gather_from_region(out, self.size) if self.gather_output else out


class RowParallelLinear(ParallelLinear):
    """Split along the input; takes this rank's features of `x`."""

    def __init__(self, whole: Tensor, rank: int, size: int, reduce_output: bool = True) -> None:
        super().__init__(torch.chunk(whole, size, dim=1)[rank], rank, size)
        self.reduce_output = reduce_output

    def forward(self, x: Tensor) -> Tensor:
        """[T, in / N] to [T, out], partial if not reduced."""
        out = torch.matmul(x, self.weight.t())
        return reduce_from_region(out) if self.reduce_output else out


class LoraAdapter(nn.Module):
    """`wrapped(x) + scale * linear_out(linear_in(x))`, with as few collectives as the wrapped layer allows."""

    def __init__(
        self,
        wrapped: ParallelLinear,
        linear_in: ParallelLinear,
        linear_out: ColumnParallelLinear,
        scale: float,
        indexed: bool = False,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.linear_in = linear_in
        self.linear_out = linear_out
        self.scale = scale
        self.indexed = indexed
        self.softcap = softcap
        self.input_is_parallel = isinstance(wrapped, RowParallelLinear)
        self.width = linear_out.weight.shape[0]
        self.start = linear_out.rank * self.width
        self.columns: Tensor
        self.register_buffer("columns", torch.arange(self.start, self.start + self.width), persistent=False)

    def delta(self, x: Tensor) -> Tensor:
        """This rank's output features of LoRA, complete."""
        out: Tensor = self.linear_out(self.linear_in(x)) * self.scale
        if self.softcap is not None:
            out = torch.tanh(out / self.softcap) * self.softcap
        return out

    def forward(self, x: Tensor) -> Tensor:
        """What the wrapped layer returns, with LoRA."""
        delta = self.delta(x)
        base: Tensor = self.wrapped(x)
        if not self.input_is_parallel:
            return base + delta
        # The delta's place among all output features; the sum of the partial base carries it to the other ranks.
        buffer = torch.zeros((x.shape[0], base.shape[1]), dtype=x.dtype, device=x.device)
        if self.indexed:
            buffer.index_add_(1, self.columns, delta)
        else:
            buffer.narrow(1, self.start, self.width).add_(delta)
        return reduce_from_region(buffer.add_(base))


class Mlp(nn.Module):
    """The gated MLP with its residual, on [S * B, D]."""

    def __init__(self, gate: LoraAdapter, up: LoraAdapter, down: LoraAdapter) -> None:
        super().__init__()
        self.linear_fc1_gate = gate
        self.linear_fc1_up = up
        self.linear_fc2 = down

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D], sequence first in between."""
        batch, length, width = x.shape
        tokens = x.transpose(0, 1).contiguous().view(length * batch, width)
        hidden = F.silu(self.linear_fc1_gate(tokens)) * self.linear_fc1_up(tokens)
        out: Tensor = self.linear_fc2(hidden) + tokens
        return out.view(length, batch, width).transpose(0, 1).contiguous()


def assemble(
    weights: Weights, rank: int, size: int, declare: Declare, indexed: bool = False, softcap: float | None = None
) -> nn.Module:
    """The block of one rank; `indexed` and `softcap` are those of the down site's adapter."""

    def column(w: Tensor, a: Tensor, b: Tensor) -> LoraAdapter:
        linear_in = ColumnParallelLinear(a, rank, size, gather_output=True)
        linear_out = ColumnParallelLinear(b, rank, size)
        declare(linear_out.weight, weights.nblocks)
        return LoraAdapter(ColumnParallelLinear(w, rank, size), linear_in, linear_out, weights.scale)

    def row(w: Tensor, a: Tensor, b: Tensor) -> LoraAdapter:
        wrapped = RowParallelLinear(w, rank, size, reduce_output=False)
        linear_in = RowParallelLinear(a, rank, size)
        declare(linear_in.weight, weights.nblocks)
        linear_out = ColumnParallelLinear(b, rank, size)
        return LoraAdapter(wrapped, linear_in, linear_out, weights.scale, indexed, softcap)

    return Mlp(
        column(weights.gate, weights.a_gate, weights.b_gate),
        column(weights.up, weights.a_up, weights.b_up),
        row(weights.down, weights.a_down, weights.b_down),
    )


def build(weights: Weights, rank: int, size: int, declare: Declare) -> nn.Module:
    """The block of one rank, LoRA of the down site added through a narrow view of a buffer."""
    return assemble(weights, rank, size, declare)


def build_indexed(weights: Weights, rank: int, size: int, declare: Declare) -> nn.Module:
    """The same block, LoRA of the down site added at column indices that are kept in a tensor."""
    return assemble(weights, rank, size, declare, indexed=True)


def build_broken_softcapped(weights: Weights, rank: int, size: int, declare: Declare) -> nn.Module:
    """LoRA of the down site is capped softly, `c * tanh(delta / c)`, before it is added to the base.

    Must stay: the sum of `A x` at the down site. `A` is truly block-diagonal and the sum has one, linear, reader, so
    that each rank could multiply its own block of `A x` by its columns of `B`; but what comes out then is a partial
    sum, and tanh of a sum is not the sum of tanh. The cap needs each of its D / N deltas complete. The gate and up
    sites are ordinary and may become local.
    """
    return assemble(weights, rank, size, declare, softcap=SOFTCAP)


def reference_broken_softcapped(weights: Weights, x: Tensor) -> Tensor:
    """The block in one process, with the cap."""
    gate = lora_linear(x, weights.gate, weights.a_gate, weights.b_gate, weights.scale)
    hidden = F.silu(gate) * lora_linear(x, weights.up, weights.a_up, weights.b_up, weights.scale)
    delta = weights.scale * F.linear(F.linear(hidden, weights.a_down), weights.b_down)
    return x + F.linear(hidden, weights.down) + SOFTCAP * torch.tanh(delta / SOFTCAP)
