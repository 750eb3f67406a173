"""Graphs that others sharded: hand-written S-LoRA code, Hugging Face tensor parallelism, `parallelize_module`."""
