"""Two ways in which people write S-LoRA by hand: an MLP whose ranks hold slices of everything, with LoRA on each layer.

`ModuleBlock` is made of modules and adds its slice of the result in place; `functional_block` is one function over a
dictionary of tensors, pads its slice, and keeps factors the other way round. Both compute, from N ranks,

    x + down(silu(up(x)))          each layer W x + scale * B (A x)

``torch.compile(block, backend="bdlora")`` removes the collectives between the factors of both: it follows what feeds
what, not how it is written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn

import bdlora_compile as bd


def world() -> Any:
    """All ranks; torch's types say that there may be none."""
    return dist.group.WORLD


@dataclass(frozen=True)
class Whole:
    """Weights of the whole block: W [O, D], A [R, D], B [O, R] of two layers.

    B of ``up`` and A of ``down`` are block-diagonal with ``nblocks`` blocks, as BD-LoRA trains them.
    """

    up: Tensor
    up_a: Tensor
    up_b: Tensor
    down: Tensor
    down_a: Tensor
    down_b: Tensor
    nblocks: int
    scale: float = 2.0

    @classmethod
    def random(cls, width: int, inner: int, rank: int, nblocks: int, dtype: torch.dtype = torch.float64) -> "Whole":
        """A block of ``width`` and ``inner`` features with adapters of ``rank``."""
        rows, columns, share = inner // nblocks, inner // nblocks, rank // nblocks
        return cls(
            up=torch.randn(inner, width, dtype=dtype) / width**0.5,
            up_a=torch.randn(rank, width, dtype=dtype) / width**0.5,
            up_b=torch.block_diag(*torch.randn(nblocks, rows, share, dtype=dtype)),
            down=torch.randn(width, inner, dtype=dtype) / inner**0.5,
            down_a=torch.block_diag(*torch.randn(nblocks, share, columns, dtype=dtype)),
            down_b=torch.randn(width, rank, dtype=dtype) / rank**0.5,
            nblocks=nblocks,
        )

    def reference(self, x: Tensor) -> Tensor:
        """What the block computes, on one device."""
        h = F.silu(x @ self.up.t() + self.scale * (x @ self.up_a.t()) @ self.up_b.t())
        return x + h @ self.down.t() + self.scale * (h @ self.down_a.t()) @ self.down_b.t()


def own_slice(tensor: Tensor, dim: int) -> Tensor:
    """This rank's piece of a tensor."""
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()].contiguous()


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class ColumnLora(nn.Module):
    """A layer that is split on its outputs, S-LoRA's way: A x is gathered from all ranks."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.weight, self.lora_a, self.lora_b = (_frozen(own_slice(part, 0)) for part in (weight, a, b))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        # Gathered along the first dim and put side by side by hand: torch 2.11 does not trace gather_dim=-1.
        shares = funcol.all_gather_tensor(F.linear(x, self.lora_a), gather_dim=0, group=world())
        h = torch.cat(shares.chunk(dist.get_world_size()), dim=-1)
        return F.linear(x, self.weight) + F.linear(h, self.lora_b) * self.scale


class RowLora(nn.Module):
    """A layer that is split on its inputs, S-LoRA's way: A x is summed, and each rank adds its slice of the outputs."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.weight, self.lora_a = _frozen(own_slice(weight, 1)), _frozen(own_slice(a, 1))
        self.lora_b = _frozen(own_slice(b, 0))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        h = funcol.all_reduce(F.linear(x, self.lora_a), "sum", world())
        own = self.lora_b.shape[0]
        y[..., dist.get_rank() * own : (dist.get_rank() + 1) * own] += self.scale * F.linear(h, self.lora_b)
        return funcol.all_reduce(y, "sum", world())


class ModuleBlock(nn.Module):
    """The block out of modules. ``declare`` says that its adapters are block-diagonal."""

    def __init__(self, whole: Whole, declare: bool = True) -> None:
        super().__init__()
        self.up = ColumnLora(whole.up, whole.up_a, whole.up_b, whole.scale)
        self.down = RowLora(whole.down, whole.down_a, whole.down_b, whole.scale)
        if declare:
            bd.declare_block_diagonal(self.up.lora_b, whole.nblocks)
            bd.declare_block_diagonal(self.down.lora_a, whole.nblocks)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D], whole on every rank."""
        return x + self.down(F.silu(self.up(x)))


def functional_block(whole: Whole, declare: bool = True) -> Callable[[Tensor], Tensor]:
    """The block as one function over a dictionary; factors are stored [in, r] and [r, out]."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own: Mapping[str, Tensor] = {
        "up": own_slice(whole.up, 0).t().contiguous(),
        "up.a": own_slice(whole.up_a, 0).t().contiguous(),
        "up.b": own_slice(whole.up_b, 0).t().contiguous(),
        "down": own_slice(whole.down, 1).t().contiguous(),
        "down.a": own_slice(whole.down_a, 1).t().contiguous(),
        "down.b": (whole.scale * own_slice(whole.down_b, 0)).t().contiguous(),
    }
    if declare:
        bd.declare_block_diagonal(own["up.b"], whole.nblocks)
        bd.declare_block_diagonal(own["down.a"], whole.nblocks)
    width = whole.down.shape[0]
    mine = width // size

    def block(x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        # Ranks' shares are gathered along the first dim, hence the transposes.
        h = funcol.all_gather_tensor((tokens @ own["up.a"]).t().contiguous(), 0, world()).t()
        inner = F.silu(torch.addmm(tokens @ own["up"], h, own["up.b"], alpha=whole.scale))
        low = funcol.all_reduce(inner @ own["down.a"], "sum", world())
        delta = F.pad(low @ own["down.b"], (rank * mine, width - (rank + 1) * mine))
        return x + funcol.all_reduce(inner @ own["down"] + delta, "sum", world()).view_as(x)

    return block
