"""Three more tensor-parallel LoRA blocks written by hand, in other styles, without knowledge of the passes."""
