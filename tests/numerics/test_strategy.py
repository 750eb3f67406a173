"""``strategy="auto"``: what the cost model chooses for which machine, and that a mixed model is still PEFT's."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bdlora_compile as bd
from bdlora_compile.census import Census
from bdlora_compile.estimate import ModelShape, estimate, phases
from bdlora_compile.factors import Layout
from bdlora_compile.ir import Origin
from bdlora_compile.machine import Link, LinkKind, SymmetricLimits, find_machine, fit_link, known_machines
from bdlora_compile.placement import Mesh
from bdlora_compile.runtime.adapter_targets import FactorKind
from bdlora_compile.runtime.agreement import Alone
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.sites import Role, Site
from bdlora_compile.step_formula import constants, step_formulas
from bdlora_compile.strategy import choose_layouts
from bdlora_compile.timing import Declared, Seconds, Terms, group_sites
from tests.models import AdapterSpec, ModelSpec, Reference, relative_error, save_adapter, save_model

GROUPS = ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj")


def machine(latency: float, memory: float = 1e12) -> bd.Machine:
    """A machine whose collectives cost ``latency`` seconds each and nothing for their bytes."""
    links = {8: Link(latency, 1e15)}
    return bd.Machine("made up", "by hand", memory, 1e15, 0.0, links, links)


def llama_8b(layers: int = 2) -> dict[str, Site]:
    """Sites of a model of 8B parameters."""
    hidden, kv, wide = 4096, 1024, 14336
    sites = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        sites += [
            Site(f"{prefix}.self_attn.q_proj", Role.COLUMN, hidden, hidden, 128),
            Site(f"{prefix}.self_attn.k_proj", Role.COLUMN, hidden, kv, 128),
            Site(f"{prefix}.self_attn.v_proj", Role.COLUMN, hidden, kv, 128),
            Site(f"{prefix}.self_attn.o_proj", Role.ROW, hidden, hidden, 128),
            Site(f"{prefix}.mlp.gate_proj", Role.COLUMN, hidden, wide),
            Site(f"{prefix}.mlp.up_proj", Role.COLUMN, hidden, wide),
            Site(f"{prefix}.mlp.down_proj", Role.ROW, wide, hidden),
        ]
    return {site.name: site for site in sites}


def chosen(profiles: Sequence[Any], on: bd.Machine, ranks: int = 8) -> dict[str, Layout]:
    """The layout of each group."""
    terms = Terms(Mesh(ranks), bd.Workload(16, 16), on, max_rank=64, element_size=2)
    layouts, decisions = choose_layouts(llama_8b(), profiles, terms)
    found = {decision.group.removeprefix("model.layers.*."): decision.chosen for decision in decisions}
    for group in group_sites(llama_8b()):
        for layer in group.layers:
            assert {layouts[site.name] for site in layer} == {found[group.label.removeprefix("model.layers.*.")]}
    return found


def profile(kind: FactorKind | None, rank: int = 64, nblocks: int = 8) -> dict[str, Declared]:
    """An adapter on every site; ``kind`` None has blocks where they lie along the split dim."""
    aligned = {Role.COLUMN: FactorKind.BLOCK_B, Role.ROW: FactorKind.BLOCK_A}
    return {
        name: Declared(kind or aligned[site.role], rank, 1 if kind is FactorKind.DENSE else nblocks)
        for name, site in llama_8b().items()
    }


@pytest.mark.parametrize("group", GROUPS)
def test_each_group_follows_the_machine(group: str) -> None:
    """Ordinary adapters: free collectives make slora cheaper everywhere, dear ones make local so."""
    ordinary = [profile(FactorKind.DENSE)]
    assert chosen(ordinary, machine(latency=1e-9))[group] is Layout.SLORA
    assert chosen(ordinary, machine(latency=1e-3))[group] is Layout.LOCAL


def test_between_them_the_groups_part() -> None:
    """From one latency to the next it is the group that saves the fewest bytes that turns local first."""
    ordinary = [profile(FactorKind.DENSE)]
    by_latency = [chosen(ordinary, machine(latency * 1e-6)) for latency in range(1, 100, 2)]
    slora = [{group for group, layout in found.items() if layout is Layout.SLORA} for found in by_latency]
    assert all(later <= earlier for earlier, later in pairwise(slora))
    mixed = {frozenset(groups) for groups in slora} - {frozenset(), frozenset(GROUPS)}
    assert mixed, "no latency at which attention and MLP differ"


@given(
    latency=st.floats(1e-9, 1e-3),
    memory=st.floats(1e9, 1e13),
    ranks=st.sampled_from([2, 4, 8]),
    blocks=st.sampled_from([2, 4, 8, 16]),
    tokens=st.integers(1, 2048),
)
@settings(max_examples=40, deadline=None)
def test_block_diagonal_adapters_are_local_on_every_machine(
    latency: float, memory: float, ranks: int, blocks: int, tokens: int
) -> None:
    profiles = [profile(None, nblocks=blocks), profile(None, rank=16, nblocks=8)]
    terms = Terms(Mesh(ranks), bd.Workload(tokens, 1), machine(latency, memory), max_rank=64, element_size=2)
    layouts, decisions = choose_layouts(llama_8b(), profiles, terms)
    assert set(layouts.values()) == {Layout.LOCAL}
    assert all("block-diagonal" in decision.why for decision in decisions)


def test_blocks_on_the_other_factor_do_not_count() -> None:
    """The twin: the same adapters with A and B exchanged are ordinary to the ranks."""
    swapped = {
        name: replace(one, kind=FactorKind.BLOCK_A if one.kind is FactorKind.BLOCK_B else FactorKind.BLOCK_B)
        for name, one in profile(None).items()
    }
    assert set(chosen([swapped], machine(1e-9)).values()) == {Layout.SLORA}


def test_one_rank_has_nothing_to_choose() -> None:
    assert set(chosen([profile(FactorKind.DENSE)], machine(1e-9), ranks=1).values()) == {Layout.LOCAL}


def test_the_decision_adds_up() -> None:
    """The parts of each estimate are those of its formula, checked by hand at o_proj: 16 adapters, 16 tokens, N = 8."""
    terms = Terms(Mesh(8), bd.Workload(16, 16), machine(2e-6, memory=1e12), max_rank=64, element_size=2)
    _, decisions = choose_layouts(llama_8b(), [profile(FactorKind.DENSE)], terms)
    (row,) = (decision for decision in decisions if decision.group.endswith("o_proj"))
    assert row.local is not None
    assert row.slora is not None
    hidden, local = 4096, 4096 // 8
    a, b = 64 * local, 64 * hidden
    assert row.local.memory == pytest.approx((2 * 16 * (a + b) + 2 * 16 * local + 2 * 2 * 16 * hidden) / 1e12)
    assert row.local.compute == pytest.approx(2 * 16 * (a + b) / 1e15)
    assert (row.local.latency, row.local.wire) == (0, 0)
    h, y, own = 4 * 16 * 64, 2 * 16 * hidden, 2 * 16 * local
    moved = 2 * 16 * (a + 64 * local) + own + 2 * h + y + own + 2 * h + y + own
    assert row.slora.memory == pytest.approx(moved / 1e12)
    assert row.slora.latency == 2e-6
    assert row.slora.wire == pytest.approx(h * 2 * 7 / 8 / 1e15)
    assert row.slora.total > row.slora.memory + row.slora.latency


SYMMETRIC = replace(
    machine(9e-6),
    symmetric={8: SymmetricLimits(1 << 20, 1 << 24)},
    one_shot={8: Link(3e-6, 1e9)},
    two_shot={8: Link(5e-6, 1e9)},
)
"""Symmetric memory with slow links, so that their bytes are seen beside the latency."""


def slora_seconds(on: bd.Machine, tokens: int, group: str) -> Seconds:
    """S-LoRA's estimate of a group for ordinary adapters, one for each token, over 8 ranks."""
    terms = Terms(Mesh(8), bd.Workload(tokens, tokens), on, max_rank=64, element_size=2)
    _, decisions = choose_layouts(llama_8b(), [profile(FactorKind.DENSE)], terms)
    (found,) = (decision.slora for decision in decisions if decision.group.endswith(group))
    assert found is not None
    return found


@pytest.mark.parametrize(("group", "sites"), [("q_proj+k_proj+v_proj", 3), ("o_proj", 1), ("down_proj", 1)])
def test_exchanges_through_symmetric_memory_hide_beside_products(group: str, sites: int) -> None:
    """By hand, 16 tokens: one-shot sends h of all sites to 7 peers; a sum of h replaces the gather of q, k and v."""
    found = slora_seconds(SYMMETRIC, 16, group)
    assert found.latency == 3e-6
    assert found.wire == pytest.approx(7 * sites * 4 * 16 * 64 / 1e9)
    in_features, out_features = {3: (4096, 768), 1: (4096 // 8, 4096)}[sites]
    in_features = 14336 // 8 if group == "down_proj" else in_features
    moved = 2 * (in_features * out_features + 16 * in_features + 16 * out_features)
    assert found.hidden == pytest.approx(moved / 1e12)
    assert found.total == pytest.approx(found.kernels + found.launches + found.latency + found.wire - moved / 1e12)


def test_a_long_product_hides_no_more_than_the_exchange() -> None:
    quick = replace(SYMMETRIC, one_shot={8: Link(1e-9, 1e15)})
    found = slora_seconds(quick, 16, "gate_proj+up_proj")
    assert found.hidden == found.latency + found.wire
    assert found.total == found.kernels + found.launches


def test_what_does_not_lie_beside_a_product_is_not_hidden() -> None:
    """More tokens than lie beside products, messages for the process group, and no symmetric memory."""
    many = slora_seconds(SYMMETRIC, BY_TOKEN_LIMIT + 1, "o_proj")
    assert (many.latency, many.hidden) == (3e-6, 0)
    small = replace(SYMMETRIC, symmetric={8: SymmetricLimits(64, 128)})
    for other in (small, SYMMETRIC.without_symmetric_memory()):
        found = slora_seconds(other, 16, "o_proj")
        assert (found.latency, found.hidden) == (9e-6, 0)
        assert found.wire == pytest.approx(2 * 7 / 8 * 4 * 16 * 64 / 1e15)


def test_larger_messages_go_two_shot() -> None:
    found = slora_seconds(replace(SYMMETRIC, symmetric={8: SymmetricLimits(64, 1 << 24)}), 16, "o_proj")
    assert found.latency == 5e-6
    assert found.wire == pytest.approx(2 * 7 / 8 * 4 * 16 * 64 / 1e9)


def test_a_machine_without_costs_of_symmetric_memory_takes_the_groups() -> None:
    """Files that `bdlora calibrate` wrote before it measured them."""
    unknown = replace(SYMMETRIC, one_shot={}, two_shot={})
    assert slora_seconds(unknown, 16, "o_proj").latency == 9e-6


@pytest.mark.parametrize("tokens", [1, 16, BY_TOKEN_LIMIT, BY_TOKEN_LIMIT + 1, 2048])
def test_the_expression_of_a_step_is_its_estimate_for_any_load(tokens: int) -> None:
    """Made for 16 rows and evaluated for others: each collective goes one-shot, two-shot or through the group."""
    on = replace(SYMMETRIC, symmetric={8: SymmetricLimits(1 << 16, 1 << 20)}, launch=1e-6)
    sites, shape = llama_8b(), ModelShape(4096, 128256, 2, 32, 8, 128)
    layouts = {group.label: Layout.SLORA for group in group_sites(sites)}
    terms = Terms(Mesh(8), bd.Workload(16, 16), on, max_rank=64, element_size=2)
    profiles = [profile(FactorKind.DENSE)]
    (told,) = step_formulas(shape, sites, profiles, {"slora": layouts}, terms)
    load = {**constants(terms, 16, 512), "T": tokens, "K": tokens}
    own = replace(terms, workload=bd.Workload(tokens, tokens))
    expected = estimate(shape, sites, profiles, "slora", layouts, own, phases(tokens, 512)[1])
    assert (expected.lora.hidden > 0) is (tokens <= BY_TOKEN_LIMIT)
    assert float(sympy.sympify(told.expression).subs(load)) == pytest.approx(expected.total, rel=1e-9)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """An adapter with blocks, and an ordinary one whose rank is much larger in attention than in the MLP."""
    folder = tmp_path_factory.mktemp("auto")
    model = save_model(ModelSpec(heads=8, kv_heads=4, layers=2), folder / "model")
    ranks = {"gate_proj": 2, "up_proj": 2, "down_proj": 2}
    specs = {"plain": AdapterSpec(rank=32, options={"rank_pattern": ranks}), "blocks": AdapterSpec(rank=8, nblocks=4)}
    return model, {name: save_adapter(spec, model, folder / name) for name, spec in specs.items()}


MIXED = bd.Machine("mixed", "by hand", 1e9, 1e15, 0.0, {4: Link(8e-6, 1e12)}, {4: Link(8e-6, 1e12)})
"""Memory so slow that the large ranks of attention are worth a collective, and those of the MLP are not."""


def test_a_mixed_model_equals_peft(files: tuple[Path, dict[str, Path]]) -> None:
    """Attention slora, MLP local: logits are PEFT's, and each half has the collectives of its layout."""
    model, paths = files
    torch._dynamo.reset()
    loaded: Any
    loaded, adapters = bd.load(
        model,
        paths,
        dtype=torch.float64,
        ranks=bd.Ranks.lockstep(4),
        strategy="auto",
        workload=bd.Workload(tokens=2, adapters=2),
        machine=MIXED,
    )
    found = {
        decision.group.removeprefix("model.layers.*."): decision.chosen for decision in loaded.bdlora.plan.decisions
    }
    assert found == dict.fromkeys(GROUPS[:2], Layout.SLORA) | dict.fromkeys(GROUPS[2:], Layout.LOCAL)
    loaded.compile(backend="bdlora")
    rows = ["plain", None, "blocks"]
    ids = torch.randint(3, 120, (3, 6), generator=torch.Generator().manual_seed(1))
    with adapters.use(rows), torch.no_grad():
        logits = loaded(ids).logits
    # 2e-7 is measured: norms and rotary angles are float32 in transformers' own code.
    assert relative_error(logits, Reference(model, paths, torch.float64).logits(ids, rows)) < 2e-6
    (report,) = bd.reports(loaded)
    assert _sites_with_collectives(report.stages[-1].census) == {"self_attn"}
    assert "layout of model.layers.*.self_attn.o_proj: slora, the cheaper one" in report.summary()
    # The twin: a factor that is not where its layout says is noticed.
    for rank in loaded.bdlora.ranks:
        rank.bank.pool.copy_(rank.bank.pool.roll(16))
    with adapters.use(rows), torch.no_grad():
        wrong = loaded(ids).logits
    assert relative_error(wrong, Reference(model, paths, torch.float64).logits(ids, rows)) > 1e-3


def test_layouts_are_priced_by_what_carries_the_sums(files: tuple[Path, dict[str, Path]]) -> None:
    """Ranks without symmetric memory are not priced as if they had the machine's."""
    model, paths = files
    loaded: Any
    ranks = bd.Ranks.lockstep(4)
    loaded, _ = bd.load(model, paths, ranks=ranks, strategy="auto", workload=bd.Workload(2, 2), machine="h100-nvlink")
    latency = find_machine("h100-nvlink").link("all_reduce", 4).latency
    estimates = {decision.group.rpartition(".")[2]: decision.slora for decision in loaded.bdlora.plan.decisions}
    assert (estimates["o_proj"].latency, estimates["o_proj"].hidden) == (latency, 0)


def _sites_with_collectives(census: Census) -> set[str]:
    return {str(one.site).split(".")[3] for one in census.collectives if one.origin is Origin.LORA}


class OtherRank(Alone):
    """Agreement with a rank whose text differs in one number."""

    def exchange(self, topic: str, text: str, *, is_setup: bool = False) -> Sequence[str]:
        return [text, text.replace("1e-06", "2e-06")]


def test_ranks_that_choose_differently_are_refused(files: tuple[Path, dict[str, Path]]) -> None:
    ranks = bd.Ranks(Mesh(8), [0], OtherRank())
    with pytest.raises(bd.AgreementError, match="choice of layouts of rank 1"):
        bd.load(files[0], files[1], ranks=ranks, strategy="auto", machine=machine(1e-6))


def test_a_load_without_a_choice_is_refused(files: tuple[Path, dict[str, Path]]) -> None:
    with pytest.raises(bd.ConfigError, match="strategy='auto'"):
        bd.load(files[0], workload=bd.Workload(), strategy="slora")
    with pytest.raises(bd.ConfigError, match="no more adapters than tokens"):
        bd.Workload(tokens=2, adapters=3)


def test_shipped_machines_and_files(tmp_path: Path) -> None:
    """Every shipped table is read; a file that is written is read back; what is wrong in one is named."""
    for name in known_machines():
        known = find_machine(name)
        assert known.name == name
        assert "20" in known.source, "a source has its date"
        (tmp_path / "copy.json").write_text(known.to_json())
        assert find_machine(tmp_path / "copy.json") == known
    assert find_machine(None, torch.device("cpu")).name == "cpu-gloo"
    with pytest.raises(bd.ConfigError, match="bdlora calibrate"):
        find_machine("no such machine")
    broken = json.loads(known.to_json()) | {"launch": -1}
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    with pytest.raises(bd.ConfigError, match="launch"):
        find_machine(tmp_path / "broken.json")


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "h200-nvlink"),
        ("NVIDIA H100 80GB HBM3", "h100-nvlink"),
        ("NVIDIA A100-SXM4-80GB", "h100-nvlink"),
    ],
)
def test_the_default_is_the_machine_of_the_gpu(gpu: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu)
    assert find_machine(None, torch.device("cuda", 0)).name == name
    assert find_machine(None).name == "h100-nvlink", "what is explained elsewhere"


def test_links_are_fitted_and_extrapolated() -> None:
    """Latency and bandwidth come back from times that they made; more ranks cost more, and say so."""
    known = Link(1.2e-5, 2e11)
    sizes = [2.0**power for power in range(5, 26, 2)]
    fitted = fit_link([(size, known.seconds(size)) for size in sizes], "all_reduce")
    assert fitted.latency == pytest.approx(known.latency)
    assert fitted.bandwidth == pytest.approx(known.bandwidth)
    with pytest.raises(bd.ConfigError, match="positive slope"):
        fit_link([(size, 1 / size) for size in sizes], "all_reduce")
    made_up = bd.Machine("m", "by hand", 1.0, 1.0, 0.0, {2: known}, {2: known})
    assert made_up.link("all_reduce", 32) == Link(2 * known.latency, known.bandwidth)
    assert made_up.is_measured(2)
    assert not made_up.is_measured(8)


def test_latencies_grow_as_they_did_from_two_to_four_h200() -> None:
    """Of all ways of exchange, within 12 %; with the square root of the ranks, the twin, some would not."""
    machine = find_machine("h200-nvlink")
    ways = (machine.all_reduce, machine.all_gather, machine.one_shot, machine.two_shot)
    grown = [way[4].latency / way[2].latency for way in ways]
    reduce, gather, one_shot, two_shot = ({2: way[2]} for way in ways)
    two = replace(machine, all_reduce=reduce, all_gather=gather, one_shot=one_shot, two_shot=two_shot)
    kinds: tuple[LinkKind, ...] = ("all_reduce", "all_gather_into_tensor", "one_shot", "two_shot")
    told = [two.link(kind, 4).latency / two.link(kind, 2).latency for kind in kinds]
    assert all(abs(own / measured - 1) < 0.12 for own, measured in zip(told, grown, strict=True))
    assert max(2**0.5 / measured - 1 for measured in grown) > 0.3
