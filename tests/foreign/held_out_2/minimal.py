"""The paper's figure 4 in one function."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as C
from torch import Tensor, nn

from tests.foreign.held_out.weights import Declare, Weights

# Renamed in newer torch, which warns about the old name.
ag: Callable[..., Tensor] = getattr(C, "all_gather_single", None) or C.all_gather_tensor
f64 = torch.float64


class Block(nn.Module):
    """`p`: W, A and B of gate, up and down, each stored [in, out]; A of gate and up are one [2, D, R / N]."""

    def __init__(self, s: float, *p: Tensor) -> None:
        super().__init__()
        self.s, self.p = s, nn.ParameterList(nn.Parameter(t.contiguous().clone(), False) for t in p)

    def forward(self, x: Tensor) -> Tensor:
        """The block's result, whole on every rank."""
        (wg, wu, wd, a, ad, bg, bu, bd), s, w = self.p, self.s, dist.group.WORLD
        h = torch.cat(ag(x.to(f64) @ a[:, None], 0, w).split(2), -1).to(f64)
        g, u = x @ wg, x @ wu
        g += (s * (h[0] @ bg)).to(x.dtype)
        u += (s * (h[1] @ bu)).to(x.dtype)
        z = g / (1 + (-g).exp()) * u
        h = C.all_reduce(z.to(f64) @ ad, "sum", w).to(f64)  # type: ignore[arg-type]
        y = C.all_reduce(z @ wd, "sum", w)  # type: ignore[arg-type]
        d = torch.cat(ag(h @ bd, 0, w).split(len(x)), -1)
        return torch.stack([x, y, (s * d).to(x.dtype)]).sum(0)


def build(weights: Weights, rank: int, size: int, declare: Declare) -> nn.Module:
    """The block of one rank."""

    def p(t: Tensor, dim: int = 0) -> Tensor:
        return t.chunk(size, dim)[rank].T

    w = weights
    m = Block(
        w.scale,
        *[p(w.gate), p(w.up), p(w.down, 1)],
        *[torch.stack([p(w.a_gate), p(w.a_up)]), p(w.a_down, 1)],
        *[p(w.b_gate), p(w.b_up), p(w.b_down)],
    )
    for i in 4, 5, 6:
        declare(m.p[i], w.nblocks)
    return m
