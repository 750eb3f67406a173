"""Features first, tokens last: the block as closures over plain tensors.

With activations kept as [features, tokens] no weight is ever transposed, a gather of features is a gather along
dimension 0 (no copy after the collective), and LoRA is the C of a GEMM: `addmm(W x, B, h, alpha=scale)`.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

from tests.foreign.held_out.weights import Declare, Weights, reference

Function = Callable[[Tensor], Tensor]

# The function got a new name in newer releases of torch, which warn when the old one is called.
_all_gather: Callable[..., Tensor] = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor


def gather_rows(h: Tensor) -> Tensor:
    """[r, T] of each rank to [N * r, T], in the order of the ranks."""
    return _all_gather(h, gather_dim=0, group=dist.group.WORLD)


def sum_ranks(h: Tensor) -> Tensor:
    """The sum over all ranks."""
    return funcol.all_reduce(h, "sum", dist.group.WORLD)  # type: ignore[arg-type]


def rows(t: Tensor, rank: int, size: int) -> Tensor:
    """This rank's contiguous part of the rows, with storage of its own."""
    return t.chunk(size, dim=0)[rank].clone()


def columns(t: Tensor, rank: int, size: int) -> Tensor:
    """This rank's contiguous part of the columns, with storage of its own."""
    return t.chunk(size, dim=1)[rank].contiguous().clone()


def column_site(w: Tensor, a: Tensor, b: Tensor, scale: float, collect: Function = gather_rows) -> Function:
    """[D, T] to [F / N, T]; `collect` turns the ranks' parts of `A x` into the whole."""

    def apply(x: Tensor) -> Tensor:
        h = collect(torch.einsum("rd,dt->rt", a, x))
        return torch.addmm(w @ x, b, h, alpha=scale)

    return apply


def row_site(w: Tensor, a: Tensor, b: Tensor, scale: float, rank: int, size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """[F / N, T] to the whole [D, T]; the residual is summed over the ranks too, 1 / N of it from each."""

    def apply(x: Tensor, residual: Tensor) -> Tensor:
        h = sum_ranks(torch.matmul(a, x))
        parts = list(torch.addmm(residual, w, x, beta=1 / size).chunk(size, dim=0))
        parts[rank] = torch.addmm(parts[rank], b, h, alpha=scale)
        return sum_ranks(torch.cat(parts, dim=0))

    return apply


class Block(nn.Module):
    """Brings [B, S, D] to [D, B * S] and back around three closures; has no parameters."""

    def __init__(self, gate: Function, up: Function, down: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate = gate
        self.up = up
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        """The block's result, whole on every rank."""
        batch, length, width = x.shape
        xt = x.reshape(batch * length, width).t()
        gate = self.gate(xt)
        hidden = gate * torch.sigmoid(gate) * self.up(xt)
        return self.down(hidden, xt).t().reshape(batch, length, width)


def build(weights: Weights, rank: int, size: int, declare: Declare) -> nn.Module:
    """The block of one rank."""

    def declared(t: Tensor) -> Tensor:
        declare(t, weights.nblocks)
        return t

    def column(w: Tensor, a: Tensor, b: Tensor) -> Function:
        return column_site(rows(w, rank, size), rows(a, rank, size), declared(rows(b, rank, size)), scale=weights.scale)

    down = row_site(
        columns(weights.down, rank, size),
        declared(columns(weights.a_down, rank, size)),
        rows(weights.b_down, rank, size),
        weights.scale,
        rank,
        size,
    )
    return Block(
        column(weights.gate, weights.a_gate, weights.b_gate), column(weights.up, weights.a_up, weights.b_up), down
    )


def build_broken_interleaved(weights: Weights, rank: int, size: int, declare: Declare) -> nn.Module:
    """The rows of `A` are dealt to the ranks in turn (row i to rank i mod N); the gather's result is sorted again.

    Must stay: both column gathers. `B` is truly block-diagonal and sees `A x` in its natural order, but the R / N
    columns that this rank's rows of `B` touch were computed by all ranks, not by this one. (With R / N = 1 the two
    orders are the same; the variant needs R / N >= 2.) The down site is the ordinary one and may become local.
    """

    def declared(t: Tensor) -> Tensor:
        declare(t, weights.nblocks)
        return t

    def gather_sorted(h: Tensor) -> Tensor:
        # Row j of rank g is row j * N + g of the whole.
        return gather_rows(h).unflatten(0, (size, h.shape[0])).transpose(0, 1).flatten(0, 1)

    def column(w: Tensor, a: Tensor, b: Tensor) -> Function:
        dealt = a[rank::size].clone()
        return column_site(rows(w, rank, size), dealt, declared(rows(b, rank, size)), weights.scale, gather_sorted)

    down = row_site(
        columns(weights.down, rank, size),
        declared(columns(weights.a_down, rank, size)),
        rows(weights.b_down, rank, size),
        weights.scale,
        rank,
        size,
    )
    return Block(
        column(weights.gate, weights.a_gate, weights.b_gate), column(weights.up, weights.a_up, weights.b_up), down
    )


def reference_broken_interleaved(weights: Weights, x: Tensor) -> Tensor:
    """Who computes a row does not change the result."""
    return reference(weights, x)
