"""Models whose adapters may change some of the linear layers alone: the same logits, and no LoRA at the others."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

import bdlora_compile as bd
from bdlora_compile.strategy import Strategy
from tests.models import ATTENTION, AdapterSpec, ModelSpec, Reference, relative_error, save_adapter, save_model

TOLERANCE = 2e-6
"""As in test_compiled."""

SPECS = {
    "attention": AdapterSpec(rank=4, nblocks=2, targets=ATTENTION),
    "query": AdapterSpec(rank=3, targets=("q_proj",)),
    "down": AdapterSpec(rank=4, targets=("down_proj",)),
}
IDS = torch.randint(3, 120, (3, 5), generator=torch.Generator().manual_seed(1))
ROWS = ["attention", "query", None]

Files = tuple[Path, dict[str, Path]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    model = save_model(ModelSpec(tied=False, bias=True), folder / "model")
    return model, {
        name: save_adapter(spec, model, folder / name, seed) for seed, (name, spec) in enumerate(SPECS.items())
    }


def loaded(files: Files, degree: int, target_modules: str | Collection[str] | None, **more: Any) -> tuple[Any, Any]:
    torch._dynamo.reset()
    ranks = bd.Ranks.lockstep(degree) if degree > 1 else None
    options = {"dtype": torch.float64, "max_rank": 4, "ranks": ranks, **more}
    model, adapters = bd.load(files[0], target_modules=target_modules, **options)
    model.compile(backend="bdlora")
    return model, adapters


def lora_sites(model: Any) -> set[str]:
    """Ends of the names of the sites that LoRA was put at."""
    return {name.rpartition(".")[2] for name in model.bdlora.plan.sites}


@pytest.mark.parametrize("strategy", ["local", "slora", "auto"])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_attention_alone_equals_peft(files: Files, degree: int, strategy: Strategy) -> None:
    """And differs from the base model, in whose layers the MLP has products and sums of its own."""
    model, adapters = loaded(files, degree, ATTENTION, strategy=strategy)
    paths = {name: files[1][name] for name in ("attention", "query")}
    for name, path in paths.items():
        adapters.load(name, path)
    expected = Reference(files[0], paths, torch.float64).logits(IDS, ROWS)
    with torch.no_grad():
        with adapters.use(ROWS):
            assert relative_error(model(IDS).logits, expected) < TOLERANCE
        assert relative_error(model(IDS).logits, expected) > 1e-3
    assert lora_sites(model) == set(ATTENTION)
    merged = next(stage for stage in bd.reports(model)[0].stages if stage.name == "merge")
    assert merged.stats.matches >= 2, "q, k and v; gate and up, too"
    assert not merged.stats.refusals


def test_other_layers_take_no_room_and_no_lora(files: Files) -> None:
    """A pool of the sites alone, and kernels at none of the others."""
    (whole, _), (part, _) = loaded(files, 2, None), loaded(files, 2, ATTENTION)
    for model in (whole, part):
        with torch.no_grad():
            model(IDS)
    pools = [model.bdlora.ranks[0].bank.pool.numel() for model in (whole, part)]
    assert pools[1] < 0.6 * pools[0], "attention has half of the features here"
    for site in ("mlp.gate_proj", "mlp.down_proj"):
        assert f"model.layers.0.{site}" in whole.bdlora.plan.sites
        assert f"model.layers.0.{site}" not in part.bdlora.plan.sites
        assert f"model.layers.0.{site}.weight" in part.bdlora.plan.weights, "ranks share it all the same"


@pytest.mark.parametrize(
    ("wanted", "sites"),
    [
        (["q_proj"], {"q_proj", "k_proj", "v_proj"}),
        (("v_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"), set(ATTENTION)),
        ("down_proj", {"down_proj"}),
        ({"up_proj"}, {"gate_proj", "up_proj"}),
        ("all-linear", {*ATTENTION, "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_layers_of_one_input_are_chosen_together(files: Files, wanted: str | Collection[str], sites: set[str]) -> None:
    assert lora_sites(loaded(files, 2, wanted)[0]) == sites


def test_some_layers_alone_have_adapters(files: Files) -> None:
    """Layers without a site compile, and the others are right."""
    model, adapters = loaded(files, 2, ["model.layers.1.self_attn.q_proj"])
    assert list(model.bdlora.plan.sites) == [
        f"model.layers.1.self_attn.{end}" for end in ("q_proj", "k_proj", "v_proj")
    ]
    with torch.no_grad():
        assert relative_error(model(IDS).logits, Reference(files[0], {}, torch.float64).logits(IDS, [None] * 3)) < 1e-5
    with pytest.raises(bd.AdapterError, match="target_modules"):
        adapters.load("query", files[1]["query"])


def test_an_adapter_of_other_layers_is_refused(files: Files) -> None:
    """At load and later; the error says how to admit it."""
    _, adapters = loaded(files, 2, ATTENTION)
    with pytest.raises(bd.AdapterError, match=r"down_proj.*load that model with these among target_modules"):
        adapters.load("down", files[1]["down"])
    assert not adapters.names
    with pytest.raises(bd.AdapterError, match="target_modules"):
        bd.load(files[0], {"down": files[1]["down"]}, target_modules=ATTENTION)


@pytest.mark.parametrize(("wanted", "found"), [(["qproj"], "'qproj'"), ([], "no name"), ("lm_head", "'lm_head'")])
def test_names_of_no_layer_are_refused(files: Files, wanted: str | list[str], found: str) -> None:
    with pytest.raises(bd.ConfigError, match=rf"target_modules: found {found}, expected .*q_proj, k_proj.*all-linear"):
        bd.load(files[0], target_modules=wanted)
