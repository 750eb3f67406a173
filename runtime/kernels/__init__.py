"""Triton kernels for the LoRA operators."""
