"""A kernel that does nearly nothing, started as those of LoRA are: what a launch costs beyond its bytes."""

import triton
import triton.language as tl
from torch import Tensor

from bdlora_compile.runtime.kernels.fields import let_next_kernel_start, wait_for_kernel_ahead
from bdlora_compile.runtime.kernels.launch import pdl
from bdlora_compile.runtime.kernels.tiles import can_overlap


@triton.jit
def count_launch(counter, OVERLAP: tl.constexpr):
    """One program. The next one gets ready meanwhile, and waits for this one before it reads the counter."""
    wait_for_kernel_ahead(OVERLAP)
    let_next_kernel_start(OVERLAP)
    tl.store(counter, tl.load(counter) + 1)


def count_launch_(counter: Tensor) -> None:
    """Add 1 to a tensor of one element."""
    overlap = can_overlap()
    count_launch[(1,)](counter, OVERLAP=overlap, num_warps=1, **pdl(overlap))
