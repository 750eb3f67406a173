"""`adapters.load` of what cannot be served: the error names the place, and nothing changes, on any rank."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bdlora_compile as bd
from tests.models import AdapterSpec, ModelSpec, Reference, relative_error, save_adapter, save_model

TOLERANCE = 2e-6
"""As in test_compiled."""
SITE = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{SITE}.lora_{factor}.weight" for factor in "AB")
OTHER = A.replace("layers.0", "layers.7")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Files:
    """A model with adapters to load."""

    model: Path
    good: Path
    swapped: Path
    large: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("loads")
    model = save_model(ModelSpec(layers=1), folder / "model")
    specs = {
        "good": AdapterSpec(rank=4, targets=("q_proj", "o_proj")),
        "swapped": AdapterSpec(rank=4, nblocks=2, swapped=True),
        "large": AdapterSpec(rank=8, targets=("q_proj",)),
    }
    paths = {name: save_adapter(spec, model, folder / name) for name, spec in specs.items()}
    return Files(model, **paths)


@pytest.fixture(scope="module")
def served(files: Files) -> tuple[Any, Any]:
    """On two ranks, with room for three adapters of rank 4; "first" is loaded."""
    return bd.load(
        files.model,
        {"first": files.good},
        max_adapters=3,
        max_rank=4,
        dtype=torch.float64,
        ranks=bd.Ranks.lockstep(2),
    )


def state(model: Any, adapters: Any) -> list[object]:
    """All that a load may write, as values."""
    tables = [
        table.tolist()
        for rank in model.bdlora.ranks
        for table in (rank.bank.pool, rank.bank.slots, rank.bank.scales, rank.bank.token_slot)
    ]
    return [adapters.names, *tables, *(rank.bank.used_elements() for rank in model.bdlora.ranks)]


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_tensor(name: str, value: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: value}


def with_nan(tensors: Tensors) -> Tensors:
    """The last value of the last factor that is read."""
    name = list(tensors)[-1]
    tensors[name].view(-1)[-1] = torch.nan
    return tensors


@dataclass(frozen=True)
class Bad:
    """A change to a good adapter, and what its error must say."""

    name: str
    says: str
    config: Mapping[str, object] = field(default_factory=dict)
    tensors: Callable[[Tensors], Tensors] = dict


BAD = [
    Bad("dora", "field 'use_dora': found True", {"use_dora": True}),
    Bad("bias", "field 'lora_bias': found True", {"lora_bias": True}),
    Bad("saved modules", "field 'modules_to_save': found ['lm_head']", {"modules_to_save": ["lm_head"]}),
    Bad("initialization", "field 'init_lora_weights': found 'pissa'", {"init_lora_weights": "pissa"}),
    Bad("shape", f"tensor {A}: found shape [4, 60]", tensors=with_tensor(A, torch.ones(4, 60))),
    Bad("missing tensor", f"1 missing: {B}", tensors=without(B)),
    Bad("extra tensor", "LoRA for model.layers.7.self_attn.q_proj", tensors=with_tensor(OTHER, torch.ones(4, 64))),
    Bad("no tensors", "tensors: found none", tensors=lambda tensors: {}),
    Bad("nothing targeted", "field 'target_modules'", {"target_modules": ["up_proj"]}),
    Bad(
        "other base",
        "wrong base model: it says it was trained on 'org/Other-7B'",
        {"base_model_name_or_path": "org/Other-7B"},
        with_tensor(A, torch.ones(4, 80)),
    ),
    Bad("blocks", "field 'use_bdlora.nblocks'", {"use_bdlora": {"target_modules_bd_b": ["_proj"], "nblocks": 3}}),
    Bad("values", "1 values that are NaN or infinite", tensors=with_nan),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_adapters_change_nothing(files: Files, served: tuple[Any, Any], tmp_path: Path, bad: Bad) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(files.good, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | bad.config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = bad.tensors(load_file(folder / "adapter_model.safetensors"))
    save_file(tensors, folder / "adapter_model.safetensors")
    refuse(served, "bad", folder, bad.says)


def refuse(served: tuple[Any, Any], name: str, folder: Path, says: str) -> None:
    model, adapters = served
    before = state(model, adapters)
    with pytest.raises(bd.AdapterError) as info:
        adapters.load(name, folder)
    assert says in str(info.value)
    assert info.value.remedy
    assert state(model, adapters) == before


def test_what_the_set_has_no_place_for_changes_nothing(files: Files, served: tuple[Any, Any]) -> None:
    """Rank over capacity, a malformed name, a folder that is not there, names that nobody loaded."""
    model, adapters = served
    refuse(served, "large", files.large, "found rank 8, expected at most max_rank=4")
    refuse(served, "no/name", files.good, "adapter name 'no/name'")
    refuse(served, "absent", files.good / "absent", "absent: found nothing")
    before = state(model, adapters)
    with pytest.raises(bd.AdapterError, match="adapter 'nobody': found no adapter of this name") as info:
        adapters.unload("nobody")
    assert "adapters.load" not in info.value.remedy, "who wants it gone need not load it first"
    with (
        pytest.raises(bd.AdapterError, match=r"adapter 'nobody': found no adapter of this name.*adapters\.load"),
        adapters.use("nobody"),
    ):
        pass
    assert state(model, adapters) == before


def test_a_good_adapter_changes_something(files: Files, served: tuple[Any, Any]) -> None:
    """The twin: the state that the other tests compare is one that a load writes."""
    model, adapters = served
    before = state(model, adapters)
    adapters.load("other", files.good)
    assert state(model, adapters) != before
    adapters.unload("other")
    assert adapters.names == before[0]


def test_swapped_lists_are_served_dense_and_said(files: Files) -> None:
    """Blocks on the side that tensor parallelism does not split: right, without their saving, and the set says so."""
    torch._dynamo.reset()
    model, adapters = bd.load(files.model, {"swapped": files.swapped}, dtype=torch.float64, ranks=bd.Ranks.lockstep(2))
    (note,) = adapters["swapped"].notes
    assert "7 sites (for example model.layers.0.self_attn.q_proj) are served as ordinary LoRA" in note
    compiled: Any = model
    compiled.compile(backend="bdlora")
    ids = torch.randint(3, 120, (2, 5))
    with adapters.use(["swapped", None]), torch.no_grad():
        found = compiled(ids).logits
    expected = Reference(files.model, {"swapped": files.swapped}, torch.float64).logits(ids, ["swapped", None])
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(("degree", "site"), [(3, SITE), (16, SITE.replace("q_proj", "o_proj"))])
def test_heads_that_the_ranks_do_not_divide(files: Files, degree: int, site: str) -> None:
    """The error names the layer, the heads and the degrees that do."""
    with pytest.raises(bd.PlacementError) as info:
        bd.load(files.model, {"good": files.good}, ranks=bd.Ranks.lockstep(degree))
    assert info.value.where == site
    assert f"8 heads on the dim that {degree} ranks split" in info.value.found
    assert info.value.remedy == "choose a degree among 1, 2, 4, 8"


def test_degrees_in_the_error_hold_for_every_layer(tmp_path: Path) -> None:
    """Of 28 heads and 4 kv heads: 7 and 14 would fail at the next layer, 1, 2 and 4 hold."""
    model = save_model(ModelSpec(layers=1, heads=28, kv_heads=4, intermediate=64), tmp_path)
    for degree in (7, 8, 14):
        with pytest.raises(bd.PlacementError) as info:
            bd.load(model, ranks=bd.Ranks.lockstep(degree))
        assert f"{degree} ranks split of a model with 28 heads and 4 kv heads" in info.value.found
        assert info.value.remedy == "choose a degree among 1, 2, 4"
    for degree in (1, 2, 4):
        bd.load(model, ranks=bd.Ranks.lockstep(degree))
