"""m = silu(gate) * up in one launch; for few tokens with what LoRA adds to gate and up (`delta.py`)."""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.fields import let_next_kernel_start, rounded_sum, wait_for_kernel_ahead


@triton.jit
def swiglu_tokens(
    gate_up, delta, m, FEATURES: tl.constexpr, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Grid (tokens, tiles of BLOCK columns). gate_up, delta [T, 2 * FEATURES], m [T, FEATURES]."""
    token, tile = tl.program_id(0), tl.program_id(1)
    o = tile * BLOCK + tl.arange(0, BLOCK)
    inside = o < FEATURES
    row = token.to(tl.int64) * (2 * FEATURES)
    wait_for_kernel_ahead(OVERLAP)
    let_next_kernel_start(OVERLAP)
    gate = tl.load(gate_up + row + o, mask=inside, other=0.0)
    up = tl.load(gate_up + row + FEATURES + o, mask=inside, other=0.0)
    kind: tl.constexpr = gate.dtype
    if HAS_DELTA:
        gate = rounded_sum(gate, tl.load(delta + row + o, mask=inside, other=0.0))
        up = rounded_sum(up, tl.load(delta + row + FEATURES + o, mask=inside, other=0.0))
    exact = gate.to(tl.float32)
    # Rounded where transformers' layers round.
    activated = (exact / (1.0 + tl.exp(-exact))).to(kind)
    product = (activated.to(tl.float32) * up.to(tl.float32)).to(kind)
    tl.store(m + token.to(tl.int64) * FEATURES + o, product, mask=inside)
