"""Adapters that cannot be served are refused with the place, what was found there, what was expected and what to do."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch

from bdlora_compile.errors import AdapterError
from bdlora_compile.runtime.adapter_file import adapter_from_tensors
from bdlora_compile.sites import Role, Site

PREFIX = "base_model.model."
BLOCKS = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 4}


def make_sites() -> dict[str, Site]:
    """q_proj [64, 48] and o_proj [48, 64] of two layers; the hidden size is 48."""
    sites = []
    for layer in range(2):
        sites.append(Site(f"model.layers.{layer}.self_attn.q_proj", Role.COLUMN, 48, 64))
        sites.append(Site(f"model.layers.{layer}.self_attn.o_proj", Role.ROW, 64, 48))
    return {site.name: site for site in sites}


SITES = make_sites()
Q0, O0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
CONFIG: Mapping[str, object] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "o_proj"],
    "base_model_name_or_path": "org/Tiny-1B",
}


def make_tensors(blocks: bool = False) -> dict[str, torch.Tensor]:
    """Factors of rank 8 for all sites; with ``blocks`` packed in 4 as ``BLOCKS`` says."""
    tensors = {}
    for name, site in SITES.items():
        a_blocks, b_blocks = (4, 1) if name.endswith("o_proj") else (1, 4)
        if not blocks:
            a_blocks = b_blocks = 1
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(8, site.in_features // a_blocks)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(site.out_features, 8 // b_blocks)
    return tensors


@dataclass(frozen=True)
class Bad:
    """A change that makes an adapter bad, and parts of the four parts of the error."""

    where: str
    found: str
    expected: str
    remedy: str
    config: Mapping[str, object] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    blocks: bool = False
    base_model: str | None = None


def check(bad: Bad, error: AdapterError) -> None:
    assert bad.where in error.where
    assert bad.found in error.found
    assert bad.expected in error.expected
    assert bad.remedy in error.remedy


def refuse(bad: Bad) -> None:
    config = {**CONFIG, **({"use_bdlora": BLOCKS} if bad.blocks else {}), **bad.config}
    tensors = {
        name: tensor for name, tensor in {**make_tensors(bad.blocks), **bad.tensors}.items() if tensor is not None
    }
    with pytest.raises(AdapterError) as info:
        adapter_from_tensors(config, tensors, SITES, source="bad", base_model=bad.base_model)
    check(bad, info.value)
    assert info.value.where.startswith("bad: ")


def test_unchanged_adapters_are_served() -> None:
    """The control of this file: without a change nothing is refused."""
    for blocks in (False, True):
        config = {**CONFIG, "use_bdlora": BLOCKS if blocks else None}
        assert len(adapter_from_tensors(config, make_tensors(blocks), SITES, source="good").factors) == 4


def bad_field(name: str, value: object, expected: str, remedy: str = "", found: str | None = None) -> Bad:
    """One field of the configuration with a value that is refused."""
    return Bad(f"field {name!r}", repr(value) if found is None else found, expected, remedy, {name: value})


def bad_blocks(found: str, expected: str, remedy: str, where: str = "use_bdlora", **fields: object) -> Bad:
    """The object use_bdlora with other fields."""
    return Bad(f"field {where!r}", found, expected, remedy, {"use_bdlora": {**BLOCKS, **fields}}, blocks=True)


WRITE = "write it as PEFT's LoraConfig saves it"
TYPES = [
    *(bad_field("r", value, "a whole number from 1 to 65536", WRITE) for value in (0, -1, "8", 3.5, True, None)),
    *(bad_field("r", value, "a whole number from 1 to 65536", WRITE) for value in (10**9, 65537)),
    *(bad_field("lora_alpha", value, "a finite number other than 0", WRITE) for value in (0, "16", False, None)),
    *(bad_field("lora_alpha", float(text), "a finite number", WRITE) for text in ("nan", "inf", "1e300", "1e-300")),
    bad_field("rank_pattern", {"q_proj": 0}, "an object of module patterns, each with a whole number", WRITE),
    bad_field("alpha_pattern", {"q_proj": 0}, "an object of module patterns, each with a finite number", WRITE),
    bad_field("use_rslora", "yes", "true or false", WRITE),
    bad_field("peft_type", "IA3", "'LORA'", WRITE),
    bad_field("peft_type", None, "'LORA'", WRITE),
    bad_field("target_modules", 5, "a list of names", WRITE),
    bad_field("target_modules", ["q_proj", 5], "a list of names", WRITE),
    bad_field("layers_to_transform", ["1"], "a list of layer numbers", WRITE),
    bad_field("exclude_modules", {"a": 1}, "a list of names", WRITE),
    bad_field("use_bdlora", True, "null or an object", WRITE),
    bad_blocks("0", "a whole number from 1", WRITE, "use_bdlora.nblocks", nblocks=0),
    bad_blocks("-4", "a whole number from 1", WRITE, "use_bdlora.nblocks", nblocks=-4),
    bad_blocks("'4'", "a whole number from 1", WRITE, "use_bdlora.nblocks", nblocks="4"),
    bad_blocks("'o_proj'", "a list of names", WRITE, "use_bdlora.target_modules_bd_a", target_modules_bd_a="o_proj"),
    bad_blocks("1", "true or false", WRITE, "use_bdlora.match_strict", match_strict=1),
]

MERGE = "merge_and_unload"
CONVERT = "path_initial_model_for_weight_conversion"
REFUSED = [
    bad_field("use_dora", True, "False", MERGE, "True (DoRA rescales"),
    bad_field("use_qalora", True, "False", "train again", "True (QALoRA"),
    bad_field("lora_bias", True, "False", MERGE, "True (B gets a trained bias)"),
    bad_field("bias", "all", "'none'", MERGE, "'all' (biases"),
    bad_field("bias", "lora_only", "'none'", MERGE, "'lora_only' (biases"),
    bad_field("fan_in_fan_out", True, "False", "write false", "True (it declares"),
    bad_field("modules_to_save", ["lm_head"], "[]", "LoRA on these layers only", "['lm_head'] (whole layers"),
    bad_field("trainable_token_indices", [1], "{}", MERGE, "[1] (rows of the embedding"),
    bad_field("layer_replication", [[0, 2]], "[]", "as a base of its own", "[[0, 2]] (layers"),
    bad_field("target_parameters", ["w"], "[]", "target_modules", "['w'] (LoRA acts on bare parameters)"),
    bad_field("alora_invocation_tokens", [1], "[]", "train again", "[1] (aLoRA"),
    bad_field("arrow_config", {}, "None", "one by one", "{} (Arrow"),
    bad_field("kasa_config", {}, "None", "train again", "{} (KaSA"),
    bad_field("monteclora_config", {}, "None", "train again", "{} (MonteCLoRA"),
    bad_field("megatron_config", {"a": 1}, "{}", "convert it", "{'a': 1} (factors"),
    *(bad_field("init_lora_weights", init, "gaussian", CONVERT) for init in ("pissa", "pissa_niter_4", "olora")),
    *(bad_field("init_lora_weights", init, "gaussian", CONVERT) for init in ("corda", "lora_ga")),
    *(bad_field("init_lora_weights", init, "gaussian", "train again") for init in ("loftq", "unheard-of")),
]

TARGETS = [
    bad_field("target_modules", [], "names of modules", "q_proj and v_proj"),
    bad_field("target_modules", None, "names of modules", "q_proj and v_proj"),
    bad_field("target_modules", "[", "a simple regular expression", "write the module names", "no valid regular"),
    bad_field("target_modules", "(" * 500, "a simple regular expression", "write the module names", "no valid regular"),
    bad_field("target_modules", "(?:.{100}){999}", "a simple regular expression", "module names", "too large"),
    bad_field("target_modules", "a|" * 2000, "a simple regular expression", "module names", "too large"),
    bad_field("rank_pattern", {"*": 4}, "a simple regular expression", "write the module names", "'*', no valid"),
    bad_field("alpha_pattern", {"a**": 4}, "a simple regular expression", "write the module names", "'a**', no valid"),
    bad_field("target_modules", "[[:alpha:]]q", "a simple regular expression", "module names", "in different ways"),
    bad_field("exclude_modules", "(?:q_proj){e}", "a simple regular expression", "module names", "in different ways"),
    bad_field("exclude_modules", "[a--b]q", "a simple regular expression", "module names", "Possible set difference"),
    Bad(
        "field 'layers_to_transform'",
        "[1] beside the expression",
        "null",
        "inside the expression",
        {"target_modules": ".*q_proj", "layers_to_transform": [1]},
    ),
    bad_field("layers_pattern", "layers", "both or none", "give layers_to_transform", "without layers_to_transform"),
    bad_field("target_modules", ["q_proj"], "the modules that have tensors", "correct target_modules", f"{O0}, "),
    bad_field("target_modules", "never", "the modules that have tensors", "correct target_modules", f"{Q0}, {O0}"),
    Bad(
        "field 'target_modules'",
        "tensors for model.layers.1.self_attn.q_proj, model.layers.1.self_attn.o_proj, which",
        "the modules that have tensors",
        "exclude_modules",
        {"exclude_modules": ".*layers.1.*"},
    ),
    bad_blocks(f"{Q0} in neither", "in one of the lists", "match_strict to false", target_modules_bd_b=[]),
    bad_blocks(f"{Q0} in target_modules_bd_a and", "in one of the lists", "longer names", target_modules_bd_a=["self"]),
    bad_blocks("'o_proj' in target", "each name in one", "o_proj, down_proj", target_modules_bd_b=["q_proj", "o_proj"]),
]


def name_of(site: str, factor: str) -> str:
    return f"{PREFIX}{site}.lora_{factor}.weight"


def bad_shape(
    factor: str, shape: tuple[int, ...], found: str, expected: str, remedy: str, site: str = Q0, blocks: bool = False
) -> Bad:
    """One factor of another shape."""
    name = name_of(site, factor)
    return Bad(f"tensor {name}", found, expected, remedy, {}, {name: torch.ones(shape)}, blocks)


def bad_tensor(name: str, found: str, remedy: str) -> Bad:
    """A tensor more, that is no factor."""
    return Bad("1 tensors", found, ".lora_A.weight and .lora_B.weight alone", remedy, {}, {name: torch.ones(2)})


TRAINED = "it says it was trained on 'org/Tiny-1B'"
SHAPES = [
    bad_shape(
        "A", (4, 48), "shape [4, 48], of another rank", "shape [8, 48] (rank 8)", "correct r and rank_pattern in"
    ),
    bad_shape("B", (64, 4), "as packed in 2 blocks", "shape [64, 8] (rank 8)", "in use_bdlora with nblocks=2"),
    bad_shape("B", (64, 5), "of another rank", "shape [64, 8] (rank 8)", TRAINED),
    bad_shape("A", (8, 40), "of another width", "shape [8, 48]", f"on the model it was trained on; {TRAINED}"),
    bad_shape("A", (48, 8), "transposed", "shape [8, 48]", "store A as [rank, in]"),
    bad_shape("A", (8,), "a shard that was not gathered", "shape [8, 48]", "ZeRO-3"),
    bad_shape("A", (0, 48), "a shard that was not gathered", "shape [8, 48]", "ZeRO-3"),
    bad_shape("A", (8, 64), "not packed", "shape [8, 16] (rank 8, packed in 4 blocks)", "remove this", O0, True),
    bad_shape("B", (64, 8), "not packed", "shape [64, 2] (rank 8, packed in 4 blocks)", "remove this", Q0, True),
    bad_shape("B", (64, 4), "as packed in 2 blocks", "shape [64, 2]", "nblocks=2, as it was trained", Q0, True),
    bad_shape("A", (8, 16), "as packed in 4 blocks", "shape [8, 64]", "(the file has no blocks for it)", O0, False),
    Bad(
        f"tensor {name_of(Q0, 'A')}",
        "of another rank",
        "(rank 4)",
        "r and rank_pattern",
        {"rank_pattern": {"q_proj": 4}},
    ),
    Bad(
        "field 'use_bdlora.nblocks'",
        f"3 at {Q0}, of rank 8 and out_features 64",
        "a divisor of the rank and of out_features",
        TRAINED,
        {"use_bdlora": {**BLOCKS, "nblocks": 3}},
    ),
    Bad(
        "field 'use_bdlora.nblocks'",
        f"3 at {O0}, of rank 6 and in_features 64",
        "a divisor of the rank and of in_features",
        TRAINED,
        {"use_bdlora": {**BLOCKS, "target_modules_bd_b": [], "match_strict": False, "nblocks": 3}, "r": 6},
        {name_of(Q0, "A"): torch.ones(6, 48), name_of(Q0, "B"): torch.ones(64, 6)},
    ),
    Bad(
        f"tensor {name_of(Q0, 'A')}",
        "of another width",
        "shape [8, 48]",
        "wrong base model: it says it was trained on 'org/Tiny-1B', and 'other/Big-8B' is served",
        {},
        {name_of(Q0, "A"): torch.ones(8, 80), name_of(Q0, "B"): torch.ones(96, 8)},
        base_model="other/Big-8B",
    ),
]

EXTRA = "serve it on the model it was trained on, or load that model with these among target_modules; "
TENSORS = [
    bad_tensor(f"{PREFIX}model.embed_tokens.lora_embedding_A.default", "an adapter name inside", "get_peft_model"),
    bad_tensor(f"{PREFIX}model.embed_tokens.lora_embedding_C", "no factor of an embedding", "save it with PEFT"),
    bad_tensor(f"{PREFIX}model.embed_tokens.base_layer.weight", "PEFT saves by default", "save_embedding_layers=False"),
    bad_tensor(f"{PREFIX}{Q0}.lora_magnitude_vector", "the magnitudes of DoRA", MERGE),
    bad_tensor(f"{PREFIX}{Q0}.lora_diag", "the diagonal of KaSA", "train again"),
    bad_tensor(f"{PREFIX}{Q0}.lora_B.bias", "a bias of lora_bias", MERGE),
    bad_tensor(f"{PREFIX}{Q0}.bias", "a trained bias", MERGE),
    bad_tensor(f"{PREFIX}{Q0}.lora_A.default.weight", "an adapter name inside", "get_peft_model_state_dict"),
    bad_tensor(f"{PREFIX}lm_head.weight", "whole weights", "save_embedding_layers=False"),
    bad_tensor(f"{PREFIX}lm_head.base_layer.weight", "whole weights", "save_embedding_layers=False"),
    bad_tensor(f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", "rows of the embedding", MERGE),
    bad_tensor(f"{PREFIX}{Q0}.lora_monteclora_sampler.std_prior", "the sampler of MonteCLoRA", "train again"),
    bad_tensor(f"{PREFIX}{Q0}.something", "no tensor that PEFT saves", "save it with PEFT"),
    bad_tensor(f"{Q0}.lora_A.weight", "names that do not start with 'base_model.model.'", "save it with PEFT"),
    bad_tensor("\n" * 999, "names that do not start", "save it with PEFT"),
    Bad(
        "tensors of 7 modules",
        "model.layers.6.self_attn.q_proj and 2 more",
        f"4 sites (q_proj, o_proj), from {Q0} to model.layers.1.self_attn.o_proj",
        EXTRA + TRAINED,
        {},
        {name_of(f"model.layers.{layer}.self_attn.q_proj", "A"): torch.ones(8, 48) for layer in range(2, 9)},
    ),
    Bad(
        "tensors of the targeted sites",
        f"1 missing: {name_of(Q0, 'B')}",
        ".lora_A.weight and .lora_B.weight of every site",
        "save the adapter again",
        {},
        {name_of(Q0, "B"): None},
    ),
    Bad(
        "tensors of the targeted sites",
        "7 missing: ",
        "of every site that adapter_config targets",
        TRAINED,
        {},
        {name: None for name in make_tensors() if name != name_of(Q0, "B")},
    ),
    Bad("tensors", "none", "at least one site", "unchanged", {}, dict.fromkeys(make_tensors())),
    Bad("", "dtype torch.int8", "float32", "convert", {}, {name_of(Q0, "A"): torch.ones(8, 48, dtype=torch.int8)}),
    Bad("", "on the meta device", "with values", "", {}, {name_of(Q0, "A"): torch.ones(8, 48, device="meta")}),
]


def label(bad: Bad) -> str:
    return f"{bad.where}-{bad.found}"[:70]


@pytest.mark.parametrize("bad", [*TYPES, *REFUSED, *TARGETS, *SHAPES, *TENSORS], ids=label)
def test_refused_with_where_found_expected_remedy(bad: Bad) -> None:
    refuse(bad)
