"""The formulas of `cost.py` against what the bank holds and what compiled graphs communicate."""

from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import bdlora_compile as bd
from bdlora_compile import cost
from bdlora_compile.census import BATCH, OUTSIDE, SEQ, number_of, wire_share
from bdlora_compile.cost import value_of
from bdlora_compile.deploying import served_sites
from bdlora_compile.errors import PlacementError
from bdlora_compile.factors import Layout, local_shape
from bdlora_compile.ir import Origin
from bdlora_compile.known_models import known_config
from bdlora_compile.machine import Link
from bdlora_compile.placement import Mesh, Shard, site_pieces
from bdlora_compile.runtime.adapter_file import FactorKind, LoraFactors
from bdlora_compile.runtime.adapter_tensors import MemoryTensor
from bdlora_compile.sites import Role, Site
from bdlora_compile.strategy import Strategy
from bdlora_compile.timing import Declared, Seconds, Terms, declared_elements, group_sites, lora_seconds
from tests.models import AdapterSpec, ModelSpec, save_adapter, save_model

NOTHING = MemoryTensor("sizes only", torch.empty(0, 0), "sizes only")


@st.composite
def sites(draw: st.DrawFn) -> tuple[Site, LoraFactors, Mesh]:
    """A site, an adapter's factors on it, and ranks, in which blocks and ranks need not divide each other."""
    ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
    blocks = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
    role = draw(st.sampled_from(Role))
    heads = draw(st.integers(1, 4)) * draw(st.sampled_from([1, ranks]))
    unit = blocks * draw(st.integers(1, 3))
    split, other = heads * unit, draw(st.integers(1, 200))
    vocabulary = draw(st.booleans())
    if vocabulary:
        # Cut into equal pieces of which the last are short.
        split, unit = blocks * draw(st.integers(1, 60)), 1
    features: dict[str, Any] = {"in_features": other, "out_features": split} if role is Role.COLUMN else {}
    features = features or {"in_features": split, "out_features": other}
    site = Site("site", role, unit=unit, vocabulary=vocabulary, **features)
    kind = draw(st.sampled_from(FactorKind))
    assume(kind is FactorKind.DENSE or blocks > 1)
    assume(kind is not FactorKind.BLOCK_A or site.in_features % blocks == 0)
    assume(kind is not FactorKind.BLOCK_B or site.out_features % blocks == 0)
    nblocks = 1 if kind is FactorKind.DENSE else blocks
    rank = nblocks * draw(st.integers(1, 20))
    mesh = Mesh(ranks)
    try:
        site_pieces(site, mesh)
    except PlacementError:
        assume(False)
    return site, LoraFactors("site", kind, rank, nblocks, 1.0, NOTHING, NOTHING), mesh


@given(sites(), st.sampled_from(Layout))
@settings(max_examples=150, deadline=None)
def test_elements_are_those_of_every_rank(case: tuple[Site, LoraFactors, Mesh], layout: Layout) -> None:
    """a and b by formula are what `local_shape` gives each rank; their maximum is what the time model takes."""
    site, factors, mesh = case
    pieces = site_pieces(site, mesh)
    declared = Declared(factors.kind, factors.rank, factors.nblocks)
    formula = cost.elements(site.role, layout)
    numbers = {cost.D: site.in_features, cost.O: site.out_features, cost.N: mesh.size, cost.M: pieces}
    numbers |= {cost.R: factors.rank, cost.G: declared.blocks_on_split_dim(site.role)}
    held = []
    for rank in range(mesh.size):
        shape = local_shape(factors, site, layout, rank, mesh)
        own = numbers | {cost.PIECE: Shard(0, pieces).piece_of(rank, mesh)}
        assert value_of(formula.a, own) == shape.a_numel
        assert value_of(formula.b, own) == shape.b_numel
        held.append(shape.a_numel + shape.b_numel)
    assert sum(declared_elements(site, declared, layout, mesh)) == max(held)


def test_a_wrong_formula_is_noticed() -> None:
    """The twin of the property: without the blocks' packing b is c times as large as what a rank holds."""
    site, mesh = Site("site", Role.COLUMN, 64, 64), Mesh(2)
    factors = LoraFactors("site", FactorKind.BLOCK_B, 8, 4, 1.0, NOTHING, NOTHING)
    numbers = {cost.O: 64, cost.R: 8, cost.G: 4, cost.M: 2, cost.PIECE: 0}
    dense = value_of(cost.local_rank(site.role) * cost.length(site.role), numbers)
    assert dense == 2 * local_shape(factors, site, Layout.LOCAL, 0, mesh).b_numel


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with fewer kv heads than four ranks, and an adapter."""
    folder = tmp_path_factory.mktemp("cost")
    model = save_model(ModelSpec(heads=8, kv_heads=2, layers=3, vocabulary=131), folder / "model")
    return model, save_adapter(AdapterSpec(rank=6), model, folder / "plain")


def payloads(model: Any, degree: int, sites: list[str], origin: Origin) -> dict[str, sympy.Expr]:
    """Payload by kind of one layer's group of sites, by formula, as expressions in batch and seq."""
    plan = model.bdlora.plan
    found: dict[str, sympy.Expr] = {}
    for name in sites:
        site = plan.sites[f"model.layers.0.{name}"]
        formula = cost.base(site.role) if origin is Origin.BASE else cost.lora(site.role, plan.layouts[site.name])
        if formula.exchange is None:
            continue
        numbers = {cost.D: site.in_features, cost.O: site.out_features, cost.C: plan.max_rank, cost.N: degree}
        numbers |= {cost.M: site_pieces(site, plan.mesh), cost.E: 8, cost.F: 8}
        value = formula.exchange.payload.xreplace({key: sympy.Integer(number) for key, number in numbers.items()})
        kind = formula.exchange.kind
        found[kind] = found.get(kind, sympy.Integer(0)) + value.xreplace({cost.T: BATCH * SEQ})
    return found


GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


@pytest.mark.parametrize(("degree", "strategy"), [(4, "local"), (4, "slora"), (2, "slora")])
def test_collectives_are_those_of_a_compiled_graph(files: tuple[Path, Path], degree: int, strategy: Strategy) -> None:
    """Number, kind and bytes of every collective of a layer, and the bytes of all three layers."""
    torch._dynamo.reset()
    model: Any
    model, _ = bd.load(
        files[0], {"plain": files[1]}, dtype=torch.float64, ranks=bd.Ranks.lockstep(degree), strategy=strategy
    )
    model.compile(backend="bdlora")
    with torch.no_grad():
        model(torch.ones(2, 5, dtype=torch.int64))
    census = bd.reports(model)[0].stages[-1].census
    first = "model.layers.0"
    for origin in (Origin.BASE, Origin.LORA):
        expected = [item for group in GROUPS for item in payloads(model, degree, group, origin).items()]
        found = [
            (one.kind, one.payload_bytes) for one in census.collectives if one.origin is origin and first in one.layers
        ]
        assert sorted(found, key=str) == sorted(expected, key=str)
        wire = sympy.Add(*(size * wire_share(kind, degree) for kind, size in expected))
        assert sympy.expand(census.bytes_of_layer(first, "wire", origin) - wire) == 0
        outside = census.bytes_of_layer(OUTSIDE, "wire", origin)
        assert sympy.expand(census.bytes_of_forward("wire", origin) - 3 * wire - outside) == 0
    # The embedding's all-reduce, and the gather of logits whose vocabulary is padded.
    width = -(-131 // degree)
    assert number_of(census.bytes_of_layer(OUTSIDE, "payload"), 2, 5) == 10 * 64 * 8 + 10 * width * degree * 8


@pytest.mark.parametrize(
    ("name", "rank", "tokens", "floor"),
    [
        ("llama-3.1-8b", 16, 16, 1.1),
        ("llama-3.1-8b", 64, 64, 13.6),
        ("llama-3.1-70b", 16, 64, 9.0),
        ("llama-3.1-70b", 64, 64, 27.1),
    ],
)
def test_bytes_are_those_of_the_kernel_benchmark(name: str, rank: int, tokens: int, floor: float) -> None:
    """The benchmark counts the bytes of its own tensors: `docs/kernels.md` has them as microseconds at 3.0 TB/s."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known_config(name))
    sites = served_sites(model, Mesh(8), strict=True)
    profile = {
        key: Declared(FactorKind.BLOCK_B if site.role is Role.COLUMN else FactorKind.BLOCK_A, rank, 8)
        for key, site in sites.items()
    }
    links = {8: Link(1.0, 1.0)}
    machine = bd.Machine("bytes alone", "by hand", 3.0e12, 1e30, 0.0, links, links)
    terms = Terms(Mesh(8), bd.Workload(tokens, tokens), machine, rank, element_size=2)
    layer = sum((lora_seconds(group, Layout.LOCAL, [profile], terms) for group in group_sites(sites)), Seconds())
    # The benchmark counts h as well, which one launch keeps to itself; its table has one decimal.
    assert layer.total * 1e6 == pytest.approx(floor, rel=0.02, abs=0.06)


def test_a_size_that_only_a_run_can_tell_is_refused() -> None:
    with pytest.raises(bd.ConfigError, match="depends on data"):
        number_of(BATCH * sympy.Symbol("u0"), 1, 1)
