"""All ranks in one process, float64, against transformers and PEFT alone: logits, tokens, collectives, graphs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Graph

import bdlora_compile as bd
from bdlora_compile.ir import Origin, operator_name
from bdlora_compile.plan import ModelPlan
from bdlora_compile.runtime import lockstep
from bdlora_compile.strategy import Strategy
from tests.models import ATTENTION, AdapterSpec, ModelSpec, Reference, relative_error, save_adapter, save_model

TOLERANCE = 2e-6
"""Norms and rotary angles are float32 in transformers' own code, also in a float64 model: 2e-7 is measured."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}

MODELS = {
    (8, 8, 8): ModelSpec(kv_heads=8),
    (8, 4, 4): ModelSpec(kv_heads=4, vocabulary=131),
    (8, 2, 4): ModelSpec(kv_heads=2, tied=False),
    (8, 2, 8): ModelSpec(kv_heads=2, vocabulary=131),
    (8, 1, 4): ModelSpec(kv_heads=1, rope=LLAMA3_ROPE),
    (6, 6, 3): ModelSpec(heads=6, kv_heads=6, vocabulary=131, tied=False, bias=True),
    (9, 3, 3): ModelSpec(heads=9, kv_heads=3),
    (4, 2, 2): ModelSpec(heads=4, kv_heads=2, intermediate=48),
    (8, 8, 1): ModelSpec(kv_heads=8, tied=False),
}


def adapters_for(degree: int) -> dict[str, AdapterSpec]:
    """Adapters of every kind: blocks as many as ranks, twice, half, ordinary ones and mixed settings."""
    three = degree in (2, 3)
    half = max(degree // 2, 1)
    return {
        "same": AdapterSpec(rank=2 * degree if degree > 1 else 4, nblocks=degree if degree > 1 else 2),
        "twice": AdapterSpec(rank=12, nblocks=6 if degree == 3 else 2 * degree)
        if degree in (1, 2, 3)
        else AdapterSpec(rank=2 * degree, nblocks=2 * degree, targets=ATTENTION[:1]),
        "fewer": AdapterSpec(rank=8, nblocks=half)
        if not three
        else AdapterSpec(rank=6, nblocks=3 if degree == 3 else 2),
        "plain": AdapterSpec(rank=5),
        "stable": AdapterSpec(rank=4, options={"use_rslora": True}),
        "patterns": AdapterSpec(
            rank=4, options={"rank_pattern": {"q_proj": 6, "down_proj": 3}, "alpha_pattern": {"up_proj": 5}}
        ),
        "attention": AdapterSpec(rank=3, targets=ATTENTION),
    }


@pytest.fixture
def files(tmp_path: Path) -> Callable[[ModelSpec, dict[str, AdapterSpec]], tuple[Path, dict[str, Path]]]:
    """Writes a model and adapters."""

    def write(spec: ModelSpec, specs: dict[str, AdapterSpec]) -> tuple[Path, dict[str, Path]]:
        model = save_model(spec, tmp_path / "model")
        paths = {
            name: save_adapter(adapter, model, tmp_path / name, seed)
            for seed, (name, adapter) in enumerate(specs.items())
        }
        return model, paths

    return write


def compiled(model: Path, paths: dict[str, Path], degree: int, strategy: Strategy, **options: Any) -> tuple[Any, Any]:
    """A model compiled for all ranks of a lock-step mesh."""
    torch._dynamo.reset()
    ranks = bd.Ranks.lockstep(degree) if degree > 1 else None
    loaded, adapters = bd.load(model, paths, dtype=torch.float64, ranks=ranks, strategy=strategy, **options)
    loaded.compile(backend="bdlora")
    return loaded, adapters


SLORA_TOO: Sequence[tuple[int, int, int]] = ((8, 4, 4), (8, 2, 8), (6, 6, 3), (4, 2, 2))
"""A kv head for each rank, several ranks for each, three ranks and biases, two ranks: the others are placed alike."""


@pytest.mark.parametrize(
    ("shape", "strategy"),
    [*((shape, "local") for shape in MODELS), *((shape, "slora") for shape in SLORA_TOO)],
    ids=str,
)
def test_logits_equal_peft(files: Any, shape: tuple[int, int, int], strategy: Strategy) -> None:
    """Every kind of adapter in one padded batch; collectives are exactly the formula's."""
    degree = shape[2]
    model, paths = files(MODELS[shape], adapters_for(degree))
    loaded, adapters = compiled(model, paths, degree, strategy)
    rows = [*paths, None]
    torch.manual_seed(1)
    ids = torch.randint(3, 120, (len(rows), 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[-1, :2] = 0
    with adapters.use(rows), torch.no_grad():
        found = loaded(ids, attention_mask=mask).logits
    expected = Reference(model, paths, torch.float64).logits(ids, rows, mask)
    keep = mask.bool()
    assert relative_error(found[keep], expected[keep]) < TOLERANCE
    census = bd.reports(loaded)[-1].stages[-1].census
    if degree > 1:
        assert set(census.per_layer(Origin.BASE)) == {2}
        assert set(census.per_layer(Origin.LORA)) == {4 if strategy == "slora" else 0}


@pytest.mark.parametrize("strategy", ["local", "slora"])
def test_the_form_for_gpus_equals_peft(files: Any, strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators that the graph has on GPUs, by their plain implementations."""
    monkeypatch.setattr(ModelPlan, "is_for_gpus", True)
    test_logits_equal_peft(files, (4, 2, 2), strategy)


def test_three_blocks_on_two_ranks(files: Any) -> None:
    """Neither of blocks and ranks divides the other: the union of overlapped blocks."""
    spec = ModelSpec(heads=6, kv_heads=6, intermediate=96)
    model, paths = files(spec, {"odd": AdapterSpec(rank=6, nblocks=3)})
    loaded, adapters = compiled(model, paths, 2, "local")
    ids = torch.randint(3, 120, (1, 5))
    with adapters.use("odd"), torch.no_grad():
        found = loaded(ids).logits
    expected = Reference(model, paths, torch.float64).logits(ids, ["odd"])
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("strategy", ["local", "slora"])
def test_a_batch_without_adapters_runs_the_base_graph(
    files: Any, monkeypatch: pytest.MonkeyPatch, strategy: Strategy
) -> None:
    """No LoRA operator runs, nor a LoRA collective; a row with an adapter brings both back."""
    model, paths = files(ModelSpec(layers=3), {"plain": AdapterSpec(rank=4)})
    loaded, adapters = compiled(model, paths, 2, strategy)
    seen: list[str] = []
    run_ranks = lockstep.run_ranks

    def spy(graph: Graph, arguments: Any) -> Any:
        seen.extend(operator_name(node) for node in graph.nodes)
        return run_ranks(graph, arguments)

    monkeypatch.setattr(lockstep, "run_ranks", spy)
    ids = torch.randint(3, 120, (2, 5))
    reference = Reference(model, paths, torch.float64)
    for rows, has_lora in (([None, None], False), (["plain", None], True), ([None, None], False)):
        seen.clear()
        with adapters.use(rows), torch.no_grad():
            found = loaded(ids).logits
        assert relative_error(found, reference.logits(ids, rows)) < TOLERANCE
        assert any("bdlora::lora" in name for name in seen) == has_lora
        # One gather of logits; with S-LoRA's placement two more in each of the three layers.
        assert sum("all_gather" in name for name in seen) == (7 if has_lora and strategy == "slora" else 1)
    (report,) = bd.reports(loaded)
    assert report.base_only[-1].census.total(Origin.LORA) == 0
    assert report.base_only[-1].census.total(Origin.BASE) == report.stages[-1].census.total(Origin.BASE)


def test_a_rank_holds_its_share_of_the_blocks(files: Any) -> None:
    """With G = cN a rank holds exactly 1/N of the adapter's numbers."""
    model, paths = files(ModelSpec(kv_heads=8), {"blocks": AdapterSpec(rank=16, nblocks=8)})
    whole, _ = compiled(model, paths, 1, "local")
    for degree in (2, 4):
        loaded, _ = compiled(model, paths, degree, "local")
        shares = {rank.bank.used_elements() for rank in loaded.bdlora.ranks}
        assert shares == {whole.bdlora.ranks[0].bank.used_elements() // degree}


def test_sabotage_is_noticed(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives deleted, scales dropped, a block shifted by one: each makes the comparison fail."""
    model, paths = files(ModelSpec(layers=1), {"blocks": AdapterSpec(rank=8, nblocks=4)})
    ids = torch.randint(3, 120, (1, 6))
    expected = Reference(model, paths, torch.float64).logits(ids, ["blocks"])

    def error(loaded: Any, adapters: Any) -> float:
        with adapters.use("blocks"), torch.no_grad():
            return relative_error(loaded(ids).logits, expected)

    loaded, adapters = compiled(model, paths, 4, "local")
    assert error(loaded, adapters) < TOLERANCE
    for rank in loaded.bdlora.ranks:
        rank.bank.scales.fill_(1.0)
    assert error(loaded, adapters) > 1e-3
    loaded, adapters = compiled(model, paths, 4, "local")
    for rank in loaded.bdlora.ranks:
        used = rank.bank.used_elements()
        rank.bank.pool[:used] = rank.bank.pool[:used].roll(64)
    assert error(loaded, adapters) > 1e-3
    loaded, adapters = compiled(model, paths, 4, "local")
    monkeypatch.setattr(
        lockstep,
        "_collect",
        lambda name, operands: [
            operand.repeat(4 if "gather" in name else 1, *[1] * (operand.ndim - 1)) for operand in operands
        ],
    )
    with pytest.raises(bd.AgreementError):
        error(loaded, adapters)


def test_generate_equals_peft_and_compiles_four_graphs(files: Any) -> None:
    """Greedy tokens of padded batches; any mix of batch and length needs at most four graphs, loads in between too."""
    specs = {"blocks": AdapterSpec(rank=4, nblocks=2), "plain": AdapterSpec(rank=5)}
    model, paths = files(ModelSpec(layers=1, heads=4, kv_heads=2, intermediate=48), specs)
    loaded, adapters = compiled(model, paths, 2, "local")
    loaded.generation_config.eos_token_id = None
    reference = Reference(model, paths, torch.float64)
    generator = torch.Generator().manual_seed(3)
    names = [None, *paths]
    for step in range(100):
        batch = int(torch.randint(1, 9, (), generator=generator))
        length = int(torch.randint(1, 65, (), generator=generator))
        ids = torch.randint(3, 120, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        if length > 2 and step % 2:
            mask[0, : length // 2] = 0
        rows = [names[int(torch.randint(0, 3, (), generator=generator))] for _ in range(batch)]
        with adapters.use(rows):
            tokens = loaded.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
        if step % 20 == 1:
            assert torch.equal(tokens[:, length:], reference.generate(ids, rows, mask, 2))
        if step % 10 == 5:
            adapters.unload("plain")
            adapters.load("plain", paths["plain"])
    # A recompile is a graph more: four in all leave none.
    assert len(bd.reports(loaded)) <= 4


def test_misuse_names_the_remedy(files: Any) -> None:
    """A hollow model run or copied another way says what to do."""
    model, paths = files(ModelSpec(layers=1), {"plain": AdapterSpec(rank=4)})
    loaded, adapters = bd.load(model, paths)
    ids = torch.randint(3, 120, (1, 4))
    wrapped: Any = torch.compile(loaded, backend="bdlora")
    calls: list[Callable[[], Any]] = [
        lambda: loaded(ids),
        lambda: loaded.model.layers[0](torch.randn(1, 2, 64)),
        lambda: torch.compile(loaded, backend="eager")(ids),
        lambda: wrapped.generate(ids, max_new_tokens=1),
        lambda: loaded.to(torch.bfloat16),
        lambda: loaded.save_pretrained("nowhere"),
        lambda: loaded.state_dict(),
    ]
    for call in calls:
        torch._dynamo.reset()
        with pytest.raises(bd.HollowError):
            call()
    with pytest.raises(bd.AdapterError, match=r"adapters\.load"), adapters.use("unknown"):
        pass
    with pytest.raises(bd.PlacementError, match="choose a degree"):
        bd.load(model, ranks=bd.Ranks.lockstep(3))


def test_adapters_that_cannot_be_loaded_change_nothing(files: Any) -> None:
    """Rank over capacity, a bad name: refused, and the set is as before."""
    specs = {"plain": AdapterSpec(rank=4), "large": AdapterSpec(rank=32)}
    model, paths = files(ModelSpec(layers=1), specs)
    _, adapters = bd.load(model, {"plain": paths["plain"]}, max_adapters=2)
    for name, path, reason in (
        ("large", paths["large"], "max_rank"),
        ("../x", paths["plain"], "choose a name"),
    ):
        with pytest.raises(bd.AdapterError, match=reason):
            adapters.load(name, path)
    assert adapters.names == ("plain",)
