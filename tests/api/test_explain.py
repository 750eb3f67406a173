"""`explain` tells what really happens: its numbers against models that were compiled with weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import bdlora_compile as bd
from bdlora_compile.census import Census
from bdlora_compile.factors import Layout, local_shape
from bdlora_compile.known_models import known_config, known_models
from bdlora_compile.machine import Link
from bdlora_compile.placement import Mesh
from bdlora_compile.runtime.adapter_file import read_adapter
from bdlora_compile.strategy import Strategy
from tests.models import ALL_SITES, AdapterSpec, ModelSpec, save_adapter, save_model

SPEC = ModelSpec(heads=8, kv_heads=2, layers=3, vocabulary=131)
MIXED = bd.Machine("mixed", "by hand, 2026", 1e9, 1e15, 0.0, {4: Link(8e-6, 1e12)}, {4: Link(8e-6, 1e12)})
"""Where the large ranks of attention are worth a collective and the small ones of the MLP are not."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A model with fewer kv heads than four ranks; adapters with and without blocks."""
    folder = tmp_path_factory.mktemp("explain")
    model = save_model(SPEC, folder / "model")
    ranks = {"gate_proj": 2, "up_proj": 2, "down_proj": 2}
    specs = {"plain": AdapterSpec(rank=32, options={"rank_pattern": ranks}), "blocks": AdapterSpec(rank=8, nblocks=4)}
    return model, {name: save_adapter(spec, model, folder / name) for name, spec in specs.items()}


def compiled(files: tuple[Path, dict[str, Path]], strategy: Strategy) -> Any:
    """The same model with weights on four lock-step ranks, after a prompt and a token."""
    model: Any
    options = {"workload": bd.Workload(2, 2), "machine": MIXED} if strategy == "auto" else {}
    model, _ = bd.load(*files, ranks=bd.Ranks.lockstep(4), strategy=strategy, **options)  # type: ignore[arg-type]
    model.compile(backend="bdlora")
    cache = bd.make_cache(model, 2, 64)
    with torch.no_grad():
        for seq in (4, 1):
            model(torch.ones(2, seq, dtype=torch.int64), past_key_values=cache, logits_to_keep=1)
    return model


def lines(census: Census) -> list[tuple[str, str, str, str, str]]:
    """A report's collectives as the explanation has them."""
    return [
        (one.kind, one.dtype, one.shape_text, str(one.wire_bytes), ",".join(one.layers)) for one in census.collectives
    ]


@pytest.mark.parametrize("strategy", ["local", "slora", "auto"])
def test_it_tells_what_a_compiled_model_does(files: tuple[Path, dict[str, Path]], strategy: Strategy) -> None:
    """Stages, collectives, layouts, bytes of weights and of factors are those of the model with weights."""
    told = bd.explain(
        files[0], adapters=files[1], tp_size=4, strategy=strategy, machine=MIXED, load=bd.Load(2, 4), strict=True
    )
    model = compiled(files, strategy)
    for graph, report in zip(told.graphs, bd.reports(model), strict=True):
        for explained, stage in zip(
            (*graph.stages, *graph.base_only), (*report.stages, *report.base_only), strict=True
        ):
            assert explained.name == stage.name
            # The guards of hollow modules are not traced for an explanation; canonicalize erases them elsewhere.
            assert explained.matches == stage.stats.matches or stage.name == "canonicalize"
            assert explained.nodes_after == stage.nodes_after
            assert [refusal.reason for refusal in explained.refusals] == [one.reason for one in stage.stats.refusals]
            found = [
                (one.kind, one.dtype, f"[{', '.join(one.shape)}]", one.wire, ",".join(one.layers))
                for one in explained.collectives
            ]
            assert found == lines(stage.census)
    plan = model.bdlora.plan
    assert [(one.group, one.chosen) for one in told.decisions] == [(one.group, one.chosen) for one in plan.decisions]
    assert told.weight_bytes == model.bdlora.ranks[0].store.num_bytes()
    adapter = read_adapter(files[1]["plain"], plan.sites)
    for site in told.sites:
        name = site.site.replace("*", "0")
        assert site.layout is plan.layouts[name]
        shapes = [local_shape(adapter.factors[name], plan.sites[name], site.layout, rank, Mesh(4)) for rank in range(4)]
        held = [(one.a_numel, one.b_numel) for one in shapes]
        assert (site.local_a[0] * site.local_a[1], site.local_b[0] * site.local_b[1]) == max(held, key=sum)


def test_it_leaves_nothing_behind(files: tuple[Path, dict[str, Path]]) -> None:
    """No process group, no weights read: a folder with nothing but config.json will do."""
    only_config = AutoConfig.from_pretrained(files[0])
    told = bd.explain(only_config, tp_size=8, adapter_rank=16, nblocks=8)
    assert not torch.distributed.is_initialized()
    assert told.graph("decode").stage("fuse").matches == 4
    assert {site.layout for site in told.sites} == {Layout.LOCAL}
    by_name = {site.site.rpartition(".")[2]: site for site in told.sites}
    # Two kv heads on eight ranks: four ranks hold each, with half of the eight blocks.
    assert by_name["k_proj"].copies == 4
    assert by_name["k_proj"].local_a == (8, 64)
    assert by_name["q_proj"].local_a == (2, 64)
    assert by_name["down_proj"].local_b == (64, 2)


def test_explanations_do_not_use_up_the_limit_of_graphs() -> None:
    """Dynamo allows some graphs for a function; each explanation has functions of its own."""
    shapes = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for degree in (2, 4):
            config = ModelSpec(layers=2, kv_heads=degree).config()
            told = bd.explain(config, tp_size=degree)
            shapes.append([graph.inputs for graph in told.graphs])
    # Nor does one learn from another that a size varies: layers, heads and head size stay numbers.
    assert all(inputs[-2].split(", ")[3] == "1" for graphs in shapes for inputs in graphs)


def test_adapters_of_the_vocabulary(tmp_path: Path) -> None:
    """Their two sites join those of the layers, with the shapes and collectives of a compiled model."""
    strategy: Strategy = "slora"
    model = save_model(SPEC, tmp_path / "model")
    spec = AdapterSpec(rank=6, targets=(*ALL_SITES, "embed_tokens"))
    files = model, {"wide": save_adapter(spec, model, tmp_path / "wide")}
    told = bd.explain(files[0], adapters=files[1], tp_size=4, strategy=strategy)
    compiled_model = compiled(files, strategy)
    for graph, report in zip(told.graphs, bd.reports(compiled_model), strict=True):
        assert [one.wire for one in graph.stages[-1].collectives] == [
            str(one.wire_bytes) for one in report.stages[-1].census.collectives
        ]
    site = told.sites[0]
    assert (site.site, site.layers, site.role) == ("model.embed_tokens", 1, "row")
    assert site.local_weight == (64, 33)
    assert told.weight_bytes == compiled_model.bdlora.ranks[0].store.num_bytes()


def test_text_and_json(files: tuple[Path, dict[str, Path]]) -> None:
    told = bd.explain(files[0], tp_size=8, adapter_rank=8, strategy="slora", load=bd.Load(4, 32, 2))
    text = told.text()
    for part in (
        "on 8 ranks, strategy slora",
        "rank 8, ordinary, on 21 sites",
        "localize left model.layers.0.self_attn.q_proj and 6 more: its factors are stored in S-LoRA placement",
        "layers 0-2",
        "q_proj+k_proj+v_proj: slora, asked for",
        "all-reduce",
        "not counted: norms",
    ):
        assert part in text, part
    again = bd.Explanation.from_json(told.to_json())
    assert again.to_json() == told.to_json()
    assert again.text() == text
    assert ("collectives over 8 ranks were not measured" in text) == told.is_extrapolated
    assert json.loads(told.to_json())["version"] == 2
    assert set(bd.Explanation.json_schema()["properties"]) == set(json.loads(told.to_json()))


def test_estimates_add_up_and_follow_the_strategy(files: tuple[Path, dict[str, Path]]) -> None:
    """The parts are the whole; block-diagonal adapters cost more with S-LoRA's collectives than without."""
    # Inputs of a model that nobody sharded give the load.
    told = bd.explain(files[0], torch.ones(3, 11, dtype=torch.int64), tp_size=4, adapter_rank=8, nblocks=4)
    assert (told.kind, told.batch, told.prompt_length) == ("explained", 3, 11)
    by_name = {(one.phase, one.strategy): one for one in told.estimates}
    assert len(by_name) == 6
    for one in told.estimates:
        parts = (one.projections, one.lora, one.attention, one.outside)
        assert one.seconds == pytest.approx(sum(part.total for part in parts))
    for phase in ("prefill", "decode"):
        local, slora = by_name[phase, "local"], by_name[phase, "slora"]
        assert local.lora.latency == local.lora.wire == 0
        assert slora.lora.latency > 0
        assert local.seconds < slora.seconds
        assert by_name[phase, "auto"].seconds == local.seconds
    # One token more a row moves less than a whole prompt.
    assert by_name["decode", "local"].seconds < by_name["prefill", "local"].seconds


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("mistral-7b", 7_248_023_552),
        ("qwen3-8b", 8_190_735_360),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_known_configurations_have_the_published_size(name: str, parameters: int) -> None:
    """Parameters as the models' own pages state them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert name in known_models()


def test_target_modules(files: tuple[Path, dict[str, Path]]) -> None:
    """Sites and bytes of the layers that adapters may change, and of those that share their input."""
    whole, attention = (
        bd.explain(files[0], tp_size=2, adapter_rank=8, strategy="slora", target_modules=modules)
        for modules in ("All-Linear", ["q_proj", "o_proj"])
    )
    ends = [{one.site.rpartition(".")[2] for one in told.sites} for told in (whole, attention)]
    assert ends[1] == {"q_proj", "k_proj", "v_proj", "o_proj"} < ends[0]
    assert attention.adapter_bytes < whole.adapter_bytes
    assert attention.weight_bytes == whole.weight_bytes


def test_bad_arguments_are_named(files: tuple[Path, dict[str, Path]]) -> None:
    with pytest.raises(bd.ConfigError, match="one of llama"):
        bd.explain("no such model", tp_size=2)
    with pytest.raises(bd.ConfigError, match="a multiple of the number of blocks"):
        bd.explain(files[0], tp_size=2, adapter_rank=6, nblocks=4)
    with pytest.raises(bd.ConfigError, match="leave out adapter_rank"):
        bd.explain(files[0], adapters=files[1], tp_size=2, nblocks=4)
    with pytest.raises(bd.PlacementError, match="choose a degree"):
        bd.explain(files[0], tp_size=3)
    with pytest.raises(bd.ConfigError, match=r"token ids \[B, S\]"):
        bd.explain(files[0], torch.ones(3), tp_size=2)
    with pytest.raises(bd.ConfigError, match="strategy"):
        bd.explain(files[0], tp_size=2, strategy="fastest")  # type: ignore[arg-type]  # what is asked
