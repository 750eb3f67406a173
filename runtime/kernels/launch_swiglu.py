"""Launching the kernel of `swiglu.py`."""

from typing import NamedTuple

from torch import Tensor

from bdlora_compile.runtime.kernels.launch import ELEMENTS_OF_A_WARP, Factors, pdl
from bdlora_compile.runtime.kernels.swiglu import swiglu_tokens
from bdlora_compile.runtime.kernels.tiles import can_overlap, swiglu_columns, swiglu_planes

_ROWS = 4
"""Rows of a factor that a program holds at once, at most: 32 elements a thread."""


class Behind(NamedTuple):
    """The product behind, down, whose h is made.

    Attributes:
        factors: where those of its one site lie.
        h: float32 [`swiglu_planes`, T, 1, a power of two that no slot's rank exceeds], to be written: planes of A m.
    """

    factors: Factors
    h: Tensor


def swiglu(
    gate_up: Tensor,
    m: Tensor,
    gate_and_up: Factors,
    scales: Tensor,
    h: Tensor | None,
    behind: Behind | None,
    parts: int = 1,
) -> None:
    """m = silu(gate) * up.

    Args:
        gate_up: [T, 2 F], F a multiple of 8; not changed.
        m: [T, F], written.
        gate_and_up: where those sites' factors lie; read if ``h`` is given.
        h: float32 [planes, T, parts * 2, any width]: the LoRA that is not in ``gate_up`` yet.
        behind: None if nobody wants its h.
        parts: ranks whose shares of h lie side by side, see `ops.lora_expand`.
    """
    (tokens, features), overlap = m.shape, can_overlap()
    columns, tiles = swiglu_columns(features), swiglu_planes(features)
    made, down = (None, 0) if behind is None else (behind.h, behind.factors.sites[0])
    width = 1 if made is None else made.shape[-1]
    swiglu_tokens[(tokens, tiles)](
        gate_up, h, m, made, gate_and_up.pool, gate_and_up.slots, scales, gate_and_up.token_slot,
        tokens, gate_and_up.num_slots, 0 if h is None else h.shape[-1], width, *gate_and_up.sites, down,
        FEATURES=features, BLOCK=columns, ROWS=_ROWS if made is None else min(_ROWS, width),
        PLANES=1 if h is None else h.shape[0], PARTS=parts, WIDTH=width, EXPAND=h is not None, SHRINK=made is not None,
        OVERLAP=overlap, num_warps=max(1, columns // ELEMENTS_OF_A_WARP), **pdl(overlap),
    )  # fmt: skip
