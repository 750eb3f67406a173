"""Models other than Llama: biases, norms of queries and keys, sliding windows, layers that differ, no plan at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

import bdlora_compile as bd
from bdlora_compile.ir import Origin
from bdlora_compile.roles import probe_roles
from bdlora_compile.sites import declared_roles
from tests.models import AdapterSpec, Reference, relative_error, save_adapter, save_model

RANKS = 4
TOLERANCE = 2e-6
"""As for Llama: transformers' float32 norms and angles; 3e-7 is measured."""

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "vocab_size": 131,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, tuple[PretrainedConfig, int]] = {
    "mistral": (MistralConfig(**SIZES, head_dim=8, sliding_window=6), 1),
    "qwen2": (Qwen2Config(**SIZES), 1),
    "qwen2 with two kinds of layers": (
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
        2,
    ),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16), 1),
    "llama with biases": (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), 1),
    "smollm3, every other layer without positions": (SmolLM3Config(**SIZES, no_rope_layer_interval=2), 2),
    "stablelm, which has no plan": (StableLmConfig(**SIZES), 1),
}
"""Configuration, and how many kinds of layers it has."""


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_tokens_equal_peft(tmp_path: Path, name: str) -> None:
    config, kinds = FAMILIES[name]
    model = save_model(config, tmp_path / "model")
    specs = {"plain": AdapterSpec(rank=4), "blocks": AdapterSpec(rank=4, nblocks=2)}
    paths = {key: save_adapter(spec, model, tmp_path / key, seed) for seed, (key, spec) in enumerate(specs.items())}
    torch._dynamo.reset()
    loaded, adapters = bd.load(model, paths, dtype=torch.float64, ranks=bd.Ranks.lockstep(RANKS))
    loaded.compile(backend="bdlora")
    torch.manual_seed(1)
    # Longer than the sliding window, so that it matters.
    ids = torch.randint(3, 120, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    rows = ["plain", None, "blocks"]
    with adapters.use(rows):
        found = loaded.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    reference = Reference(model, paths, torch.float64)
    length = ids.shape[1]
    assert torch.equal(found.sequences[:, length:], reference.generate(ids, rows, mask, 4))
    whole = torch.cat([mask, torch.ones(len(rows), 4, dtype=mask.dtype)], dim=1)
    expected = reference.logits(found.sequences, rows, whole)[:, length - 1 : -1]
    assert relative_error(torch.stack(found.logits, dim=1), expected) < TOLERANCE
    assert len(bd.reports(loaded)) <= 4
    for report in bd.reports(loaded):
        assert report.stage("deduplicate").stats.notes == {"layers": 3, "kept": kinds}
        assert report.stage("check roles").stats.matches == kinds * len(loaded.bdlora.plan.sites) // 3
        census = report.stages[-1].census
        assert census.per_layer(Origin.BASE) == [2, 2, 2]
        assert census.total(Origin.LORA) == 0
        num_masked = {"mistral": 3, "qwen2 with two kinds of layers": 2}.get(name, 0)
        assert (f"all keys under a whole mask in {num_masked} layers" in report.attention) == (num_masked > 0)
        assert (f"each row's own keys in {3 - num_masked} layer" in report.attention) == (num_masked < 3)


@pytest.mark.parametrize(
    "config", [LlamaConfig(), MistralConfig(), Qwen2Config(), Qwen3Config()], ids=lambda it: it.model_type
)
def test_roles_by_dataflow_are_those_of_the_models_own_plan(config: PretrainedConfig) -> None:

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert probe_roles(config) == declared_roles(model)


def test_a_plan_that_contradicts_the_graph_names_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries by rows and outputs by columns: served by gathers only if asked for."""
    model = save_model(LlamaConfig(**SIZES), tmp_path / "model")
    wrong = dict(LlamaConfig.base_model_tp_plan)
    wrong["layers.*.self_attn.o_proj"] = "colwise"
    monkeypatch.setattr(LlamaConfig, "base_model_tp_plan", wrong)
    ids = torch.randint(3, 120, (2, 5))
    torch._dynamo.reset()
    loaded, _ = bd.load(model, dtype=torch.float64, ranks=bd.Ranks.lockstep(2))
    loaded.compile(backend="bdlora")
    with pytest.raises(bd.PlacementError, match=r"o_proj: found the plan has it as a column layer; .* is a row layer"):
        loaded(ids)
    torch._dynamo.reset()
    loaded, _ = bd.load(model, dtype=torch.float64, ranks=bd.Ranks.lockstep(2), strict=False)
    loaded.compile(backend="bdlora")
    with torch.no_grad():
        found = loaded(ids).logits
    assert relative_error(found, Reference(model, {}, torch.float64).logits(ids, [None, None])) < TOLERANCE
    assert bd.reports(loaded)[-1].stages[-1].census.total(Origin.FALLBACK) > 0


def test_a_model_without_roles_is_refused_on_one_rank_too(tmp_path: Path) -> None:
    """GPT-2 has no linear layers in PyTorch's sense: fewer ranks are no remedy."""
    config = GPT2Config(n_embd=32, n_head=4, n_layer=2, n_positions=64, vocab_size=131, bos_token_id=1, eos_token_id=2)
    with pytest.raises(bd.PlacementError, match="no linear layer begins or ends a block") as info:
        bd.load(save_model(config, tmp_path))
    assert info.value.remedy == "use a Llama-like model"


def test_layers_that_the_plan_does_not_split_are_refused_or_held_whole(tmp_path: Path) -> None:
    """Phi-3 joins q, k and v in one weight, which is not cut between heads."""
    model = save_model(Phi3Config(**SIZES), tmp_path / "model")
    with pytest.raises(bd.PlacementError, match=r"layers\.0\.self_attn\.o_proj and 11 more: .*strict=False"):
        bd.load(model, ranks=bd.Ranks.lockstep(2))
    torch._dynamo.reset()
    loaded, _ = bd.load(model, dtype=torch.float64, ranks=bd.Ranks.lockstep(2), strict=False)
    loaded.compile(backend="bdlora")
    ids = torch.randint(3, 120, (2, 5))
    with torch.no_grad():
        found = loaded(ids).logits
    assert relative_error(found, Reference(model, {}, torch.float64).logits(ids, [None, None])) < TOLERANCE
    refusals = bd.reports(loaded)[-1].stage("tag").stats.refusals
    assert len(refusals) == 12
    assert "every rank holds it whole" in refusals[0].reason
