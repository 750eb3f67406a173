"""A `torch.compile` backend that serves one Llama with many LoRA adapters on many GPUs."""
