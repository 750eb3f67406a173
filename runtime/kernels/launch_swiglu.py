"""Launching the kernel of `swiglu.py`."""

import torch
from torch import Tensor

from bdlora_compile.runtime.kernels.launch import Factors, pdl
from bdlora_compile.runtime.kernels.swiglu import swiglu_tokens
from bdlora_compile.runtime.kernels.tiles import can_overlap, h_width, swiglu_columns, swiglu_planes

_ELEMENTS_OF_A_WARP = 256
"""16 bytes of bf16 for each thread."""
_ROWS = 4
"""Rows of a factor that a program holds at once, at most: 32 elements a thread."""


def swiglu(
    gate_up: Tensor,
    gate_and_up: Factors,
    scales: Tensor,
    h: Tensor | None,
    down: Factors | None,
    width: int,
) -> tuple[Tensor, Tensor | None]:
    """(m, h of down).

    Args:
        gate_up: [T, 2 F], F a multiple of 8; not changed.
        gate_and_up: where those sites' factors lie; read if ``h`` is given.
        h: float32 [planes, T, 2, any width]: the LoRA that is not in ``gate_up`` yet.
        down: where the factors of the product behind lie; None if nobody wants its h.
        width: no slot has a larger rank at down.

    Returns:
        m: [T, F], silu(gate) * up. h of down: float32 [tiles of F, T, 1, h_width(width)], planes of A m.
    """
    tokens, features = gate_up.shape[0], gate_up.shape[1] // 2
    overlap, num_slots = can_overlap(), gate_and_up.num_slots
    columns, tiles, rows = swiglu_columns(features), swiglu_planes(features), h_width(width)
    m = gate_up.new_empty(tokens, features)
    made = None if down is None else m.new_empty(tiles, tokens, 1, rows, dtype=torch.float32)
    sites = (*gate_and_up.sites, 0 if down is None else down.sites[0])
    swiglu_tokens[(tokens, tiles)](
        gate_up, h, m, made, gate_and_up.pool, gate_and_up.slots, scales, gate_and_up.token_slot,
        tokens, num_slots, 0 if h is None else h.shape[-1], rows, *sites,
        FEATURES=features, BLOCK=columns, ROWS=min(_ROWS, rows), PLANES=1 if h is None else h.shape[0], WIDTH=rows,
        EXPAND=h is not None, SHRINK=down is not None, OVERLAP=overlap,
        num_warps=max(1, columns // _ELEMENTS_OF_A_WARP), **pdl(overlap),
    )  # fmt: skip
    return m, made
