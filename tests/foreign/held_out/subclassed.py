"""The block as subclasses of `nn.Linear`, gate and up merged into one layer with one gather for both of its LoRAs."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign.held_out.weights import Declare, Weights, lora_linear

EPSILON = 1e-6


class LoraLinear(nn.Linear):
    """A rank's part of a linear layer; subclasses register LoRA's factors and say how the ranks work together."""

    def __init__(self, weight: Tensor, scaling: float, rank: int, size: int) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
        self.register("weight", weight)
        self.scaling = scaling
        self.rank = rank
        self.size = size

    def register(self, name: str, value: Tensor) -> nn.Parameter:
        """Registers a copy of a slice, so that the whole tensor can be freed, and returns the parameter."""
        parameter = nn.Parameter(value.clone(memory_format=torch.contiguous_format), requires_grad=False)
        self.register_parameter(name, parameter)
        return parameter


class MergedColumnLoraLinear(LoraLinear):
    """gate and up: weight [2F / N, D], both A in one [2R / N, D], one B [F / N, R] each."""

    lora_a: nn.Parameter
    lora_b_gate: nn.Parameter
    lora_b_up: nn.Parameter

    def __init__(self, weights: Weights, rank: int, size: int, declare: Declare) -> None:
        def merged(gate: Tensor, up: Tensor) -> Tensor:
            return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])

        super().__init__(merged(weights.gate, weights.up), weights.scale, rank, size)
        self.register("lora_a", merged(weights.a_gate, weights.a_up))
        declare(self.register("lora_b_gate", weights.b_gate.chunk(size)[rank]), weights.nblocks)
        declare(self.register("lora_b_up", weights.b_up.chunk(size)[rank]), weights.nblocks)

    def shrink(self, x: Tensor) -> Tensor:
        """`A x` of gate and up as [B, S, 2, R], with one collective."""
        h = F.linear(x, self.lora_a)
        gathered = h.new_empty(self.size, *h.shape)
        # all_gather_into_tensor stacks the ranks along dimension 0, and a rank's part holds gate before up.
        dist.all_gather_into_tensor(gathered.flatten(0, 1), h)
        return gathered.unflatten(-1, (2, -1)).movedim(0, -2).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, 2F / N], gate before up."""
        out = super().forward(x)
        h_gate, h_up = self.shrink(x).unbind(-2)
        half = self.out_features // 2
        out[..., :half].add_(F.linear(h_gate, self.lora_b_gate), alpha=self.scaling)
        out[..., half:].add_(F.linear(h_up, self.lora_b_up), alpha=self.scaling)
        return out


class NormedMergedColumnLoraLinear(MergedColumnLoraLinear):
    """As its parent, with `A x` brought to unit RMS over all of its R features before B."""

    def shrink(self, x: Tensor) -> Tensor:
        """`A x / rms(A x)` of gate and up."""
        h = super().shrink(x)
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPSILON)


class RowLoraLinear(LoraLinear):
    """down: weight [D, F / N], A [R, F / N], B [D / N, R] with the scaling already inside."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __init__(self, weights: Weights, rank: int, size: int, declare: Declare) -> None:
        super().__init__(weights.down.chunk(size, dim=1)[rank], 1.0, rank, size)
        declare(self.register("lora_a", weights.a_down.chunk(size, dim=1)[rank]), weights.nblocks)
        self.register("lora_b", weights.b_down.chunk(size)[rank] * weights.scale)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, F / N] to the whole [B, S, D]: each rank adds its D / N of LoRA to its partial sum."""
        h = F.linear(x, self.lora_a)
        dist.all_reduce(h)
        out = super().forward(x)
        width = self.lora_b.shape[0]
        start = self.rank * width
        out[..., start : start + width] += F.linear(h, self.lora_b)
        dist.all_reduce(out)
        return out


class GatedMlp(nn.Module):
    """`x + down(silu(gate) * up)` over a merged layer."""

    def __init__(self, gate_up_proj: MergedColumnLoraLinear, down_proj: RowLoraLinear) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """The block's result, whole on every rank."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        result: Tensor = x + self.down_proj(self.act_fn(gate) * up)
        return result


def build(weights: Weights, rank: int, size: int, declare: Declare) -> nn.Module:
    """The block of one rank."""
    return GatedMlp(MergedColumnLoraLinear(weights, rank, size, declare), RowLoraLinear(weights, rank, size, declare))


def build_broken_normed(weights: Weights, rank: int, size: int, declare: Declare) -> nn.Module:
    """An RMS norm between A and B of gate and up.

    Must stay: the gather that serves gate and up. The norm of `A x` is taken over all R features, so that the block
    of B on this rank needs features of every rank although its own columns are local. An element-wise function could
    move before the gather; this one cannot. The down site is the ordinary one and may become local.
    """
    return GatedMlp(
        NormedMergedColumnLoraLinear(weights, rank, size, declare), RowLoraLinear(weights, rank, size, declare)
    )


def reference_broken_normed(weights: Weights, x: Tensor) -> Tensor:
    """The block in one process, with the norm."""

    def normed(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h = F.linear(x, a)
        h = h / (h.square().mean(-1, keepdim=True) + EPSILON).sqrt()
        return F.linear(x, weight) + weights.scale * F.linear(h, b)

    gate = normed(weights.gate, weights.a_gate, weights.b_gate)
    hidden = F.silu(gate) * normed(weights.up, weights.a_up, weights.b_up)
    return x + lora_linear(hidden, weights.down, weights.a_down, weights.b_down, weights.scale)
