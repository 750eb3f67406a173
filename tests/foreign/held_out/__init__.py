"""Tensor-parallel LoRA blocks written by hand, without knowledge of the passes that are tested on them."""
