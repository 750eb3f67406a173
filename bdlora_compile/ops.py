"""LoRA operators for serving code of one's own: one pool of factors, a slot table, a slot for each token.

On NVIDIA GPUs with bf16 or fp16 they run as Triton kernels, elsewhere as plain PyTorch; they trace under
``torch.compile`` and are safe to capture in CUDA graphs. `bdlora_compile.runtime.bank.AdapterBank` keeps a pool.
"""

from bdlora_compile.runtime.linear_op import lora_linear
from bdlora_compile.runtime.ops import SlotField, lora_apply, lora_apply_, lora_expand, lora_shrink, lora_work

__all__ = [
    "SlotField",
    "lora_apply",
    "lora_apply_",
    "lora_expand",
    "lora_linear",
    "lora_shrink",
    "lora_work",
]
