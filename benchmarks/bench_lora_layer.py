"""LoRA inside decoder layers that the compiler emitted, against the same kernels and products alone.

    python -m benchmarks.bench_lora_layer --json FILE

A model whose layers have the local shapes of rank 0 of 8 (8B) is compiled and captured in a CUDA graph, once with
adapters chosen for every row and once without; the difference is what LoRA adds to a layer. Beside it stands what
`bench_lora_kernels.py` measures: a layer's four products with LoRA, less the products alone.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import bdlora_compile as bd
from bdlora_compile.backend import bdlora
from benchmarks.lora_layers import MODELS, Case, Layers
from benchmarks.replays import replay_us

LAYERS = 8
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def local_config(ranks: int) -> LlamaConfig:
    """A Llama as one rank of ``ranks`` sees an 8B's layers."""
    m = MODELS["8B"]
    return LlamaConfig(
        hidden_size=m.hidden,
        intermediate_size=m.intermediate // ranks,
        num_attention_heads=m.hidden // 128 // ranks,
        num_key_value_heads=m.kv // 128 // ranks,
        head_dim=128,
        num_hidden_layers=LAYERS,
        vocab_size=1024,
    )


def write_adapter(folder: Path, config: LlamaConfig, rank: int) -> None:
    """An adapter of this rank for all sites, as PEFT writes one."""
    q, kv = config.num_attention_heads * 128, config.num_key_value_heads * 128
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for module, (columns, rows) in zip(MODULES, shapes, strict=True):
            block = "mlp" if module in MODULES[4:] else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, columns, dtype=torch.bfloat16) / 64
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, dtype=torch.bfloat16) / 64
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    description = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    description |= {"target_modules": list(MODULES), "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(description))


def emitted_us(tokens: int, rank: int) -> tuple[float, float]:
    """(without LoRA, with LoRA): microseconds of a layer of the compiled model."""
    config = local_config(8)
    with torch.device("cuda"):
        plain = LlamaForCausalLM(config).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        paths = {f"a{number}": Path(folder) / f"a{number}" for number in range(tokens)}
        for path in paths.values():
            write_adapter(path, config, rank)
        model, adapters = bd.attach(plain, paths, max_adapters=tokens, max_rank=rank)
    # A captured graph serves one number of tokens.
    model.compile(backend=bdlora, dynamic=False)
    ids = torch.randint(3, 1000, (tokens, 1), device="cuda")

    def forward() -> None:
        model(ids, use_cache=False)

    times = []
    with torch.no_grad():
        for names in (None, list(paths)):
            with adapters.use(names):
                # The first forward writes the tokens' slots; the others, which are captured, find them written.
                forward()
                times.append(replay_us(forward) / LAYERS)
    return times[0], times[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both figures for a few cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    for tokens, rank in ((16, 2), (64, 8)):
        base, full = emitted_us(tokens, rank)
        alone = Layers(Case("8B", 8, "rep", rank, tokens, tokens, tokens))
        standalone = alone.us(True) - alone.us(False)
        row: dict[str, Any] = {"device": torch.cuda.get_device_name(), "tokens": tokens, "local_rank": rank}
        row |= {"layer_us": base, "layer_with_lora_us": full, "lora_us": full - base, "standalone_us": standalone}
        print(
            f"{tokens} tokens, local rank {rank}: layer {base:.1f} us, with LoRA {full:.1f}; adds {full - base:.1f}, "
            f"alone {standalone:.1f}: the layer is {full / (base + standalone):.2f} of what its parts take alone",
            flush=True,
        )
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
