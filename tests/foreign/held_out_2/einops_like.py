"""The block as einsums over named axes; collectives move the axis that they work on to the front.

b batch, s sequence, d model features, f this rank's hidden features, n block, r feature within a block, m and q as n
and r after mixing, g rank. A of the column sites and B of the row site are stored per block; the declared factors
stay matrices and are viewed per block where they are used. Scale is inside of A from the start.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, einsum, nn

from tests.foreign.held_out.weights import Declare, Weights, lora_linear

# The function got a new name in newer releases of torch, which warn when the old one is called.
_all_gather: Callable[..., Tensor] = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor


def local_blocks(nblocks: int, size: int) -> int:
    """How many blocks a rank has; one if the blocks do not fall on the ranks evenly."""
    return nblocks // size if nblocks % size == 0 else 1


def mixer(width: int) -> Tensor:
    """A fixed butterfly [R, R]: each feature plus the one half of all features away."""
    eye = torch.eye(width, dtype=torch.float64)
    return eye + eye.roll(width // 2, dims=0)


class EinsumBlock(nn.Module):
    """A rank's part of the block; `mixer_up` is an R x R matrix between A and B of the up site, if given."""

    w_gate: Tensor  # f d
    w_up: Tensor  # f d
    w_down: Tensor  # d f
    a_gate: Tensor  # n r d, the blocks of this rank
    a_up: Tensor  # n r d, the blocks of this rank
    b_down: Tensor  # n r d, all blocks, the output features of this rank
    b_gate: Tensor  # f (n r)
    b_up: Tensor  # f (n r)
    a_down: Tensor  # (n r) f
    place: Tensor  # g, one for this rank and zero for the others
    mixer_up: Tensor | None  # n r m q

    def __init__(
        self, weights: Weights, rank: int, size: int, declare: Declare, mixer_up: Tensor | None = None
    ) -> None:
        super().__init__()
        mine = local_blocks(weights.nblocks, size)
        self.blocks = mine * size

        def keep(name: str, value: Tensor) -> Tensor:
            self.register_buffer(name, value.clone(memory_format=torch.contiguous_format))
            return self.get_buffer(name)

        keep("w_gate", weights.gate.chunk(size, 0)[rank])
        keep("w_up", weights.up.chunk(size, 0)[rank])
        keep("w_down", weights.down.chunk(size, 1)[rank])
        keep("a_gate", weights.scale * weights.a_gate.chunk(size, 0)[rank].unflatten(0, (mine, -1)))
        keep("a_up", weights.scale * weights.a_up.chunk(size, 0)[rank].unflatten(0, (mine, -1)))
        keep("b_down", weights.b_down.chunk(size, 0)[rank].T.unflatten(0, (self.blocks, -1)))
        declare(keep("b_gate", weights.b_gate.chunk(size, 0)[rank]), weights.nblocks)
        declare(keep("b_up", weights.b_up.chunk(size, 0)[rank]), weights.nblocks)
        declare(keep("a_down", weights.scale * weights.a_down.chunk(size, 1)[rank]), weights.nblocks)
        keep("place", F.one_hot(torch.tensor(rank), size).to(weights.down.dtype))
        per_block = (self.blocks, weights.a_up.shape[0] // self.blocks)
        self.register_buffer(
            "mixer_up", None if mixer_up is None else mixer_up.unflatten(1, per_block).unflatten(0, per_block)
        )

    def column(self, x: Tensor, w: Tensor, a: Tensor, b: Tensor, mix: Tensor | None = None) -> Tensor:
        """`b s d` to `b s f`."""
        h = _all_gather(einsum("bsd,nrd->nbsr", x, a), gather_dim=0, group=dist.group.WORLD)
        if mix is not None:
            h = einsum("nbsr,mqnr->mbsq", h, mix)
        delta = einsum("nbsr,fnr->bsf", h, b.unflatten(1, (self.blocks, -1)))
        return einsum("bsd,fd->bsf", x, w) + delta

    def row(self, x: Tensor) -> Tensor:
        """`b s f` to the whole `b s d`; an outer product puts this rank's part in its place among zeros."""
        h = einsum("bsf,nrf->rnsb", x, self.a_down.unflatten(0, (self.blocks, -1)))
        h = funcol.all_reduce(h, "sum", dist.group.WORLD)  # type: ignore[arg-type]
        delta = einsum("rnsb,nrd->dsb", h, self.b_down)
        placed = einsum("dsb,g->gdsb", delta, self.place).flatten(0, 1)
        partial = einsum("bsf,df->dsb", x, self.w_down) + placed
        return einsum("dsb->bsd", funcol.all_reduce(partial, "sum", dist.group.WORLD))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The block's result, whole on every rank."""
        gate = self.column(x, self.w_gate, self.a_gate, self.b_gate)
        up = self.column(x, self.w_up, self.a_up, self.b_up, self.mixer_up)
        return x + self.row(einsum("bsf,bsf->bsf", F.silu(gate), up))


def build(weights: Weights, rank: int, size: int, declare: Declare) -> nn.Module:
    """The block of one rank."""
    return EinsumBlock(weights, rank, size, declare)


def build_broken_mixed(weights: Weights, rank: int, size: int, declare: Declare) -> nn.Module:
    """A fixed linear mixing of all R features between A and B of the up site.

    Must stay: the gather of the up site. All is linear and `B` is truly block-diagonal, but the features that a
    block of `B` reads are no longer those that the same rank computed: each is the sum of one of this rank and one of
    a rank half of all ranks away. The gate site has no mixing and the down site is the ordinary one; both may become
    local.
    """
    return EinsumBlock(weights, rank, size, declare, mixer(weights.a_up.shape[0]))


def reference_broken_mixed(weights: Weights, x: Tensor) -> Tensor:
    """The block in one process, with the mixing."""
    a_up = mixer(weights.a_up.shape[0]) @ weights.a_up
    gate = lora_linear(x, weights.gate, weights.a_gate, weights.b_gate, weights.scale)
    hidden = F.silu(gate) * lora_linear(x, weights.up, a_up, weights.b_up, weights.scale)
    return x + lora_linear(hidden, weights.down, weights.a_down, weights.b_down, weights.scale)
