"""Launching the kernel of `swiglu.py`."""

import triton
from torch import Tensor

from bdlora_compile.runtime.kernels.launch import pdl
from bdlora_compile.runtime.kernels.swiglu import swiglu_tokens
from bdlora_compile.runtime.kernels.tiles import ELEMENTS_OF_A_WARP, can_overlap

_COLUMNS = 1024
"""Columns of a program, at most."""


def swiglu(gate_up: Tensor, m: Tensor, delta: Tensor | None) -> None:
    """m = silu(gate) * up.

    Args:
        gate_up: [T, 2 F], contiguous.
        m: [T, F], contiguous; written.
        delta: [at least T, 2 F], contiguous: what ``gate_up`` lacks.
    """
    (tokens, features), overlap = m.shape, can_overlap()
    if m.numel() == 0:
        return
    columns = min(_COLUMNS, triton.next_power_of_2(features))
    swiglu_tokens[(tokens, triton.cdiv(features, columns))](
        gate_up, delta, m, FEATURES=features, BLOCK=columns, HAS_DELTA=delta is not None, OVERLAP=overlap,
        num_warps=max(1, columns // ELEMENTS_OF_A_WARP), **pdl(overlap),
    )  # fmt: skip
