"""`forward(params, spec, x)`: the block as pure functions over a dictionary of parameters.

Every matrix is stored as [in, out] and applied as `x @ m`. Scale is applied before B, never after it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign.held_out.weights import Declare, Weights

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Spec:
    """What a rank has to know beside its parameters."""

    rank: int
    size: int
    scale: float


RowSite = Callable[[Params, Spec, Tensor], Tensor]


def psum(x: Tensor) -> Tensor:
    """The sum over all ranks."""
    return funcol.all_reduce(x, "sum", dist.group.WORLD)  # type: ignore[arg-type]


def concat_ranks(x: Tensor, spec: Spec) -> Tensor:
    """The ranks' tensors side by side in the last dimension."""
    pieces = [torch.empty_like(x) for _ in range(spec.size)]
    dist.all_gather(pieces, x, group=dist.group.WORLD)
    return torch.cat(pieces, dim=-1)


def column(params: Params, spec: Spec, name: str, x: Tensor) -> Tensor:
    """[B, S, D] to [B, S, F / N]; scale is applied to this rank's R / N features, before they are gathered."""
    h = concat_ranks(spec.scale * (x @ params[f"{name}_a"]), spec)
    return h @ params[f"{name}_b"] + x @ params[f"{name}_w"]


def row_padded(params: Params, spec: Spec, x: Tensor) -> Tensor:
    """[B, S, F / N] to [B, S, D]; this rank's D / N of LoRA is padded with zeros and rides in the base's sum."""
    h = psum((x * spec.scale) @ params["down_a"])
    delta = h @ params["down_b"]
    width = delta.shape[-1]
    padded = F.pad(delta, (spec.rank * width, (spec.size - 1 - spec.rank) * width))
    return psum(padded + x @ params["down_w"])


def row_gathered(params: Params, spec: Spec, x: Tensor) -> Tensor:
    """As `row_padded`, but the base is summed alone and the D / N pieces of LoRA are gathered beside it."""
    base = psum(x @ params["down_w"])
    h = psum(x @ params["down_a"]) * spec.scale
    return base + concat_ranks(h @ params["down_b"], spec)


def row_confident(params: Params, spec: Spec, x: Tensor) -> Tensor:
    """As `row_padded`, but each token's LoRA is weighed by how strongly the token excites the whole adapter."""
    h = psum(x @ params["down_a"])
    confidence = torch.tanh(h.abs().mean(dim=-1, keepdim=True))
    delta = (h * confidence * spec.scale) @ params["down_b"]
    zeros = delta.new_zeros(()).expand(delta.shape)
    pieces = [delta if rank == spec.rank else zeros for rank in range(spec.size)]
    return psum(x @ params["down_w"] + torch.cat(pieces, dim=-1))


def forward(params: Params, spec: Spec, x: Tensor, row: RowSite = row_padded) -> Tensor:
    """The block's result, whole on every rank."""
    hidden = F.silu(column(params, spec, "gate", x)) * column(params, spec, "up", x)
    return row(params, spec, hidden) + x


def shard(weights: Weights, rank: int, size: int, declare: Declare) -> nn.ParameterDict:
    """This rank's parameters, all as [in, out]."""

    def piece(t: Tensor, dim: int) -> nn.Parameter:
        return nn.Parameter(t.chunk(size, dim)[rank].t().contiguous().clone(), requires_grad=False)

    params = nn.ParameterDict(
        {
            "up_w": piece(weights.up, 0),  # [D, F / N]
            "up_a": piece(weights.a_up, 0),  # [D, R / N]
            "up_b": piece(weights.b_up, 0),  # [R, F / N]
            "gate_w": piece(weights.gate, 0),
            "gate_a": piece(weights.a_gate, 0),
            "gate_b": piece(weights.b_gate, 0),
            "down_w": piece(weights.down, 1),  # [F / N, D]
            "down_a": piece(weights.a_down, 1),  # [F / N, R]
            "down_b": piece(weights.b_down, 0),  # [R, D / N]
        }
    )
    for name in ("up_b", "gate_b", "down_a"):
        declare(params[name], weights.nblocks)
    return params


class Bound(nn.Module):
    """`forward` with its parameters bound."""

    def __init__(self, params: nn.ParameterDict, spec: Spec, row: RowSite) -> None:
        super().__init__()
        self.params = params
        self.spec = spec
        self.row = row

    def forward(self, x: Tensor) -> Tensor:
        """The block's result, whole on every rank."""
        return forward(dict(self.params.items()), self.spec, x, self.row)


def build(weights: Weights, rank: int, size: int, declare: Declare) -> nn.Module:
    """The block of one rank, LoRA of the down site padded into the base's sum."""
    return Bound(shard(weights, rank, size, declare), Spec(rank, size, weights.scale), row_padded)


def build_gathered(weights: Weights, rank: int, size: int, declare: Declare) -> nn.Module:
    """The same block, LoRA of the down site gathered after the base's sum."""
    return Bound(shard(weights, rank, size, declare), Spec(rank, size, weights.scale), row_gathered)


def build_broken_confident(weights: Weights, rank: int, size: int, declare: Declare) -> nn.Module:
    """LoRA of the down site is weighed by a tensor that is computed from all of `A x`.

    Must stay: the sum of `A x` at the down site. Its result has a second reader: the mean over all R features, which
    is not linear and which no rank can take of its own R / N features. The gate and up sites are ordinary and may
    become local.
    """
    return Bound(shard(weights, rank, size, declare), Spec(rank, size, weights.scale), row_confident)


def reference_broken_confident(weights: Weights, x: Tensor) -> Tensor:
    """The block in one process, with the confidence."""
    scale = weights.scale
    gate = x @ weights.gate.T + scale * (x @ weights.a_gate.T @ weights.b_gate.T)
    up = x @ weights.up.T + scale * (x @ weights.a_up.T @ weights.b_up.T)
    hidden = F.silu(gate) * up
    h = hidden @ weights.a_down.T
    confidence = torch.tanh(h.abs().mean(dim=-1, keepdim=True))
    return x + hidden @ weights.down.T + scale * confidence * (h @ weights.b_down.T)
