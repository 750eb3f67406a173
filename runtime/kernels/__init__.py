"""Triton kernels for the LoRA operators: bf16 and fp16 on NVIDIA GPUs, sums in float32 (see docs/kernels.md)."""
