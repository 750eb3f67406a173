"""Small models and adapters, and what they compute according to transformers and PEFT alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import BdLoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_SITES = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")
VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class ModelSpec:
    """A Llama small enough for a test."""

    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 8
    layers: int = 2
    intermediate: int = 96
    vocabulary: int = 128
    tied: bool = True
    rope: Mapping[str, Any] | None = None
    bias: bool = False

    def config(self) -> LlamaConfig:
        """transformers' configuration of it."""
        extra = {} if self.rope is None else {"rope_parameters": dict(self.rope)}
        return LlamaConfig(
            hidden_size=self.heads * self.head_dim,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            attention_bias=self.bias,
            mlp_bias=self.bias,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            max_position_embeddings=512,
            **extra,
        )


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA adapter with random factors; ``nblocks`` above 0 makes it block-diagonal."""

    rank: int = 8
    nblocks: int = 0
    targets: Sequence[str] = ALL_SITES
    swapped: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> LoraConfig:
        """PEFT's configuration of it."""
        settings: dict[str, Any] = {"r": self.rank, "lora_alpha": 12, "target_modules": list(self.targets)}
        if self.nblocks:
            bd_a, bd_b = (COLUMN, ROW) if self.swapped else (ROW, COLUMN)
            settings["use_bdlora"] = BdLoraConfig(
                target_modules_bd_a=list(bd_a), target_modules_bd_b=list(bd_b), nblocks=self.nblocks
            )
        return LoraConfig(**settings, **self.options)


def save_model(spec: ModelSpec | PretrainedConfig, folder: Path, seed: int = 0) -> Path:
    """Write a random model; weights are large enough that every part matters to the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(spec.config() if isinstance(spec, ModelSpec) else spec)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    model.save_pretrained(folder)
    return folder


def save_adapter(spec: AdapterSpec, model: Path, folder: Path, seed: int = 0) -> Path:
    """Write a random adapter by PEFT's own code."""
    torch.manual_seed(seed + 1000)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), spec.config())
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return folder


class Reference:
    """The plain model with PEFT's adapters, uncompiled, one row at a time."""

    def __init__(self, model: Path, adapters: Mapping[str, Path], dtype: torch.dtype) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").eval()
        self.model: Any = base
        for name, path in adapters.items():
            if not isinstance(self.model, PeftModel):
                self.model = PeftModel.from_pretrained(base, path, adapter_name=name, autocast_adapter_dtype=False)
            else:
                self.model.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
        self.model.to(dtype)

    @torch.no_grad()
    def logits(self, ids: Tensor, rows: Sequence[str | None], mask: Tensor | None = None) -> Tensor:
        """[batch, seq, vocabulary]; a row's padding (mask 0) is left out and its logits are zero."""
        keep = torch.ones_like(ids) if mask is None else mask
        out = []
        for row, name in enumerate(rows):
            own = keep[row].bool()
            result = self._run(ids[row : row + 1, own], name)
            full = result.new_zeros(ids.shape[1], result.shape[-1])
            full[own] = result
            out.append(full)
        return torch.stack(out)

    @torch.no_grad()
    def generate(self, ids: Tensor, rows: Sequence[str | None], mask: Tensor, new_tokens: int) -> Tensor:
        """Greedy tokens [batch, new_tokens], without a cache."""
        results = []
        for row, name in enumerate(rows):
            tokens = ids[row : row + 1, mask[row].bool()]
            start = tokens.shape[1]
            for _ in range(new_tokens):
                following = self._run(tokens, name)[-1].argmax().view(1, 1)
                tokens = torch.cat([tokens, following], dim=1)
            results.append(tokens[0, start:])
        return torch.stack(results)

    def _run(self, ids: Tensor, name: str | None) -> Tensor:
        if not isinstance(self.model, PeftModel):
            return self.model(ids, use_cache=False).logits[0]
        if name is None:
            with self.model.disable_adapter():
                return self.model(ids, use_cache=False).logits[0]
        self.model.set_adapter(name)
        return self.model(ids, use_cache=False).logits[0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
