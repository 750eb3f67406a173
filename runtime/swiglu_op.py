"""silu(gate) * up as one operator, which adds what LoRA adds to the product of gate and up."""

import torch
from torch import Tensor

from bdlora_compile.runtime.linear_op import missing_from, with_delta
from bdlora_compile.runtime.ops import has_kernels


@torch.library.custom_op("bdlora::swiglu", mutates_args=())
def swiglu(y: Tensor, delta: Tensor) -> Tensor:
    """m = silu(gate) * up of y = (gate, up).

    Args:
        y: [..., 2 F], of F columns each.
        delta: what y lacks, from `linear_op.lora_linear_beside`.

    Returns:
        [..., F] like y; gate, up and silu(gate) are rounded to its dtype.
    """
    gate, up = with_delta(y, delta).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).contiguous()


@swiglu.register_fake
def _(y: Tensor, delta: Tensor) -> Tensor:
    return y.new_empty(*y.shape[:-1], y.shape[-1] // 2)


@swiglu.register_kernel("cuda")
def _(y: Tensor, delta: Tensor) -> Tensor:
    if not has_kernels(y.dtype):
        return swiglu._init_fn(y, delta)
    from bdlora_compile.runtime.kernels import launch_swiglu  # Triton is there on GPUs only

    rows = y.reshape(-1, y.shape[-1]).contiguous()
    m = rows.new_empty(rows.shape[0], y.shape[-1] // 2)
    launch_swiglu.swiglu(rows, m, missing_from(y, delta))
    return m.view(*y.shape[:-1], m.shape[-1])
