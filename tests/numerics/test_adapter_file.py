"""Adapters that PEFT writes are read as PEFT computes them; bad ones are in test_adapter_refusals.py."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import BdLoraConfig
from peft.tuners.lora.config import VeloraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bdlora_compile.errors import AdapterError
from bdlora_compile.runtime.adapter_config import AdapterConfig, parse_config
from bdlora_compile.runtime.adapter_fields import HARMLESS, REFUSED
from bdlora_compile.runtime.adapter_file import (
    Adapter,
    FactorKind,
    LoraFactors,
    adapter_from_tensors,
    read_adapter,
)
from bdlora_compile.runtime.adapter_targets import plan_sites
from bdlora_compile.sites import Role, Site

# PEFT reads an attribute that this transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
COLUMN = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ROW = ["o_proj", "down_proj"]
WHOLE = slice(None)


def llama(num_layers: int = 2) -> LlamaForCausalLM:
    """A random Llama: hidden 64, 8 heads of 8, 4 kv heads, intermediate 96."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=48,
    )
    return LlamaForCausalLM(config)


def llama_sites(num_layers: int = 2) -> dict[str, Site]:
    """The sites of ``llama``, from the modules themselves."""
    sites = {}
    for name, module in llama(num_layers).named_modules():
        end = name.rpartition(".")[2]
        if end in ALL_SEVEN and isinstance(module, nn.Linear):
            role = Role.ROW if end in ROW else Role.COLUMN
            sites[name] = Site(name, role, module.in_features, module.out_features)
    return sites


SITES = llama_sites()


def train(**fields: Any) -> nn.Module:
    """A PEFT model whose factors are all random, as after training."""
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(**fields))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return cast(nn.Module, model)


def save(model: nn.Module, folder: Path, **changes: object) -> Path:
    """Write the adapter as PEFT does, then change fields of its configuration."""
    cast(Any, model).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """PEFT's LoRA layers by site name, in the order of the model."""
    prefix = "base_model.model."
    return {name.removeprefix(prefix): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def expand(packed: torch.Tensor, nblocks: int) -> torch.Tensor:
    """The dense form of a packed factor."""
    return cast(torch.Tensor, torch.block_diag(*torch.chunk(packed, nblocks, dim=0)))  # type: ignore[no-untyped-call]


def dense_pair(factors: LoraFactors) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, D] and B [O, R] of a site."""
    a, b = factors.a.view(), factors.b.view()
    if factors.kind is FactorKind.BLOCK_A:
        a = expand(a, factors.nblocks)
    if factors.kind is FactorKind.BLOCK_B:
        b = expand(b, factors.nblocks)
    return a, b


BLOCKS = BdLoraConfig(target_modules_bd_a=ROW, target_modules_bd_b=COLUMN, nblocks=4)
SWAPPED = BdLoraConfig(target_modules_bd_a=COLUMN, target_modules_bd_b=ROW, nblocks=4)
MIXED = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2, match_strict=False)
ONE_BLOCK = BdLoraConfig(target_modules_bd_a=ROW, target_modules_bd_b=COLUMN, nblocks=1)
ROUND_TRIPS: dict[str, dict[str, Any]] = {
    "dense": {"r": 8, "target_modules": ALL_SEVEN},
    "attention only": {"r": 4, "lora_alpha": 12, "target_modules": ATTENTION},
    "all-linear": {"r": 4, "target_modules": "all-linear"},
    "expression": {"r": 4, "target_modules": r".*layers\.1\..*(q|v)_proj"},
    "excluded": {"r": 4, "target_modules": ATTENTION, "exclude_modules": ["layers.0.self_attn.k_proj"]},
    "one layer": {"r": 4, "target_modules": ATTENTION, "layers_to_transform": [1], "layers_pattern": "layers"},
    "rslora": {"r": 8, "lora_alpha": 20, "use_rslora": True, "target_modules": ALL_SEVEN},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ALL_SEVEN,
        "rank_pattern": {r"^model\.layers\.0\..*proj": 4, "down_proj": 12},
        "alpha_pattern": {"q_proj": 5, r"layers.1.self_attn.(k|v)_proj": 7},
    },
    "patterns and rslora": {
        "r": 8,
        "target_modules": ATTENTION,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"o_proj": 3},
        "use_rslora": True,
    },
    "blocks": {"r": 8, "target_modules": ALL_SEVEN, "use_bdlora": BLOCKS},
    "blocks with ranks": {
        "r": 8,
        "target_modules": ALL_SEVEN,
        "use_bdlora": BLOCKS,
        "use_rslora": True,
        "rank_pattern": {"o_proj": 16},
    },
    "blocks, swapped": {"r": 8, "target_modules": ALL_SEVEN, "use_bdlora": SWAPPED},
    "blocks, mixed": {"r": 6, "target_modules": ALL_SEVEN, "use_bdlora": MIXED},
    "one block": {"r": 6, "target_modules": ALL_SEVEN, "use_bdlora": ONE_BLOCK},
    "gaussian": {"r": 4, "target_modules": ATTENTION, "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "target_modules": ATTENTION, "init_lora_weights": "orthogonal"},
    "mica": {"r": 4, "target_modules": ATTENTION, "init_lora_weights": "mica"},
    "velora": {"r": 4, "target_modules": ATTENTION, "velora_config": VeloraConfig(num_groups=4)},
}


@pytest.mark.parametrize("fields", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
@pytest.mark.parametrize("in_memory", [False, True], ids=["folder", "memory"])
def test_every_site_computes_what_peft_computes(fields: dict[str, Any], in_memory: bool, tmp_path: Path) -> None:
    model = train(**fields).eval()
    if in_memory:
        config = cast(Any, model).peft_config["default"].to_dict()
        adapter = adapter_from_tensors(config, get_peft_model_state_dict(model), SITES, source="memory")
    else:
        adapter = read_adapter(save(model, tmp_path), SITES)
    layers = lora_layers(model)
    assert list(adapter.factors) == list(layers)
    assert adapter.max_rank == max(layer.r["default"] for layer in layers.values())
    for name, layer in layers.items():
        factors, site = adapter.factors[name], SITES[name]
        assert (factors.site, factors.rank) == (name, layer.r["default"])
        assert factors.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        torch.testing.assert_close(factors.a.view(), layer.lora_A["default"].weight, rtol=0, atol=0)
        torch.testing.assert_close(factors.b.view(), layer.lora_B["default"].weight, rtol=0, atol=0)
        a, b = dense_pair(factors)
        x = torch.randn(3, site.in_features)
        call = cast(Callable[[torch.Tensor], torch.Tensor], layer)
        delta = call(x) - cast(nn.Linear, layer.get_base_layer())(x)
        # Float32 sums of 96 terms in another order: 3.8e-6 was measured.
        torch.testing.assert_close(factors.scaling * (x @ a.T) @ b.T, delta, rtol=1e-4, atol=2e-5)


def read_kinds(fields: dict[str, Any], folder: Path) -> dict[str, tuple[FactorKind, int]]:
    adapter = read_adapter(save(train(**fields), folder), SITES)
    return {name.rpartition(".")[2]: (factors.kind, factors.nblocks) for name, factors in adapter.factors.items()}


def test_kinds_of_blocks(tmp_path: Path) -> None:
    wanted = {name: (FactorKind.BLOCK_A if name in ROW else FactorKind.BLOCK_B, 4) for name in ALL_SEVEN}
    assert read_kinds(ROUND_TRIPS["blocks"], tmp_path) == wanted


def test_one_block_is_dense(tmp_path: Path) -> None:
    assert read_kinds(ROUND_TRIPS["one block"], tmp_path) == dict.fromkeys(ALL_SEVEN, (FactorKind.DENSE, 1))


def test_mixed_adapter_has_both_kinds(tmp_path: Path) -> None:
    wanted = dict.fromkeys(ALL_SEVEN, (FactorKind.DENSE, 1))
    wanted |= {"o_proj": (FactorKind.BLOCK_A, 2), "q_proj": (FactorKind.BLOCK_B, 2)}
    assert read_kinds(ROUND_TRIPS["blocks, mixed"], tmp_path) == wanted


@pytest.mark.parametrize("in_memory", [False, True], ids=["file", "memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_views_are_the_stored_tensors(dtype: torch.dtype, in_memory: bool, tmp_path: Path) -> None:
    folder = save(train(r=8, target_modules=["q_proj"]), tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    config = json.loads((folder / "adapter_config.json").read_text())
    adapter = adapter_from_tensors(config, tensors, SITES, source="m") if in_memory else read_adapter(folder, SITES)
    factors = adapter.factors["model.layers.1.self_attn.q_proj"]
    assert (factors.b.shape, factors.b.dtype) == ((64, 8), dtype)
    view = factors.b.view()
    assert view.dtype == dtype
    assert torch.equal(view, tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"])


def count_mappings(file: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(file))


def test_file_is_mapped_only_while_it_is_read(tmp_path: Path) -> None:
    adapter = read_adapter(save(train(r=8, target_modules=ATTENTION), tmp_path), SITES)
    file, descriptors = tmp_path / "adapter_model.safetensors", len(os.listdir("/proc/self/fd"))
    sums = [factors.a.view().sum() for factors in adapter.factors.values()]
    assert count_mappings(file) == 0
    with adapter.opened(), adapter.opened():
        sums += [factors.b.view().sum() for factors in adapter.factors.values()]
        assert count_mappings(file) == 1
    assert count_mappings(file) == 0
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert len(sums) == 16


def test_memory_needs_no_opening() -> None:
    model = train(r=4, target_modules=["q_proj"])
    adapter = adapter_from_tensors(
        {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": {"q_proj"}, "use_bdlora": None},
        get_peft_model_state_dict(model),
        SITES,
        source="m",
    )
    with adapter.opened():
        assert adapter.factors["model.layers.0.self_attn.q_proj"].a.shape == (4, 64)


def test_file_that_changed_after_the_check_is_not_read(tmp_path: Path) -> None:
    adapter = read_adapter(save(train(r=8, target_modules=["q_proj"]), tmp_path), SITES)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(AdapterError, match=r"another file than the one that was checked.*load the adapter again"):
        adapter.factors["model.layers.0.self_attn.q_proj"].a.view()


def notes_of(adapter: Adapter) -> str:
    return "\n".join(adapter.notes)


def test_plain_adapter_has_no_notes(tmp_path: Path) -> None:
    assert read_adapter(save(train(r=8, target_modules=ALL_SEVEN), tmp_path), SITES).notes == ()


def test_swapped_lists_are_said_once(tmp_path: Path) -> None:
    adapter = read_adapter(save(train(**ROUND_TRIPS["blocks, swapped"]), tmp_path), SITES)
    assert len(adapter.notes) == 1
    assert "14 sites (for example model.layers.0.self_attn.q_proj) are served as ordinary LoRA" in adapter.notes[0]
    assert "down_proj and o_proj in target_modules_bd_a" in adapter.notes[0]
    assert "gate_proj and k_proj and q_proj and up_proj and v_proj in target_modules_bd_b" in adapter.notes[0]


def test_velora_buffers_are_ignored_aloud(tmp_path: Path) -> None:
    adapter = read_adapter(save(train(**ROUND_TRIPS["velora"]), tmp_path), SITES)
    assert adapter.notes == ("8 tensors that VeLoRA uses while training are ignored",)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"new_field": 3, "empty": [], "off": False}, "does not know are ignored: new_field=3"),
        ({"revision": "v2"}, "revision 'v2' of its base model, which is not checked"),
        ({"base_model_name_or_path": "org/Other-7B"}, "trained on 'org/Other-7B', and 'org/Tiny-1B/' is served"),
        ({"target_modules": ["q_proj", "query"]}, "target_modules names what no site matches: 'query'"),
        ({"alpha_pattern": {"qproj": 4}}, "alpha_pattern has keys that match no targeted site: 'qproj'"),
        ({"alpha_pattern": {"q_proj": 4, ".*": 5}}, "alpha_pattern has several keys with different values for 2 sites"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_served_but_worth_saying(changes: Mapping[str, object], note: str, tmp_path: Path) -> None:
    folder = save(train(r=8, target_modules=["q_proj"]), tmp_path, **changes)
    adapter = read_adapter(folder, SITES, base_model="org/Tiny-1B/")
    assert len(adapter.notes) == 1
    assert note in adapter.notes[0]


def test_base_model_is_compared_by_last_part(tmp_path: Path) -> None:
    folder = save(train(r=8, target_modules=["q_proj"]), tmp_path, base_model_name_or_path="a/b/Tiny-1b/")
    assert read_adapter(folder, SITES, base_model="org/tiny-1B").notes == ()


def test_peft_sorts_patterns_when_it_saves(tmp_path: Path) -> None:
    """Why several matching keys earn a note: the order that decided in training is not the order of the file."""
    model = train(r=8, target_modules=["q_proj"], alpha_pattern={"q_proj": 4, "layers.0.self_attn.q_proj": 2})
    adapter = read_adapter(save(model, tmp_path), SITES)
    name = "model.layers.0.self_attn.q_proj"
    assert (lora_layers(model)[name].scaling["default"], adapter.factors[name].scaling) == (4 / 8, 2 / 8)
    assert "the first in the file is used, as in PEFT" in notes_of(adapter)


def test_every_field_of_peft_is_classified_once() -> None:
    groups = [AdapterConfig.model_fields.keys(), HARMLESS.keys(), REFUSED.keys()]
    for field in dataclasses.fields(LoraConfig):
        assert sum(field.name in group for group in groups) == 1, field.name
    assert set().union(*groups) == {field.name for field in dataclasses.fields(LoraConfig)}
    blocks = AdapterConfig.model_validate({"peft_type": "LORA", "use_bdlora": {}}).use_bdlora
    assert blocks is not None
    assert blocks.model_dump() == dataclasses.asdict(BdLoraConfig())


def test_defaults_are_those_of_peft() -> None:
    theirs = LoraConfig()
    ours = AdapterConfig.model_validate({"peft_type": "LORA"})
    for name in AdapterConfig.model_fields:
        assert (getattr(ours, name) or None) == (getattr(theirs, name) or None), name
    for name, refusal in REFUSED.items():
        assert getattr(theirs, name) in refusal.off


MODULES = st.sampled_from([*ALL_SEVEN, "layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "self_attn", "proj"])
EXPRESSIONS = st.sampled_from(
    [r".*q_proj", r".*\.(1|0)\..*_proj", r"model\.layers\.0.*", r"(?i).*O_PROJ", "all", r".*"]
)
KEYS = st.sampled_from(
    ["q_proj", r"^model.layers.0.mlp.up_proj", r".*\.1\..*", r"layers\.\d+\.self_attn.*", "o|k_proj"]
)


@st.composite
def matching_fields(draw: st.DrawFn) -> dict[str, Any]:
    names = st.lists(MODULES, min_size=1, max_size=4, unique=True)
    fields: dict[str, Any] = {
        "target_modules": draw(names | EXPRESSIONS),
        "exclude_modules": draw(st.none() | names | EXPRESSIONS),
        "rank_pattern": draw(st.dictionaries(KEYS, st.integers(1, 64), max_size=3)),
        "alpha_pattern": draw(st.dictionaries(KEYS, st.integers(1, 64), max_size=3)),
        "use_rslora": draw(st.booleans()),
    }
    if isinstance(fields["target_modules"], list):
        fields["layers_to_transform"] = draw(st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=2))
        if fields["layers_to_transform"] is not None:
            fields["layers_pattern"] = draw(st.sampled_from([None, "layers", ["h", "layers"], "blocks", ["lay.*"]]))
    return fields


@given(matching_fields())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_matching_is_that_of_peft(fields: dict[str, Any]) -> None:
    theirs = LoraConfig(**fields)
    config, _ = parse_config({"peft_type": "LORA", **fields}, "generated")
    plans, _ = plan_sites(config, SITES, "generated")
    ranks, alphas = fields["rank_pattern"], fields["alpha_pattern"]
    wanted = {}
    for name in SITES:
        if check_target_module_exists(theirs, name):
            rank = ranks.get(get_pattern_key(list(ranks), name), theirs.r)
            alpha = alphas.get(get_pattern_key(list(alphas), name), theirs.lora_alpha)
            wanted[name] = (rank, alpha / (rank**0.5 if theirs.use_rslora else rank))
    assert {name: (plan.rank, plan.scaling) for name, plan in plans.items()} == wanted
