"""LoRA beside base products, added by what reads them: norms behind sums, activations, rotations."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.fx import GraphModule, Interpreter, Node

from bdlora_compile.collectives import all_reduce
from bdlora_compile.factors import Layout, LocalFactors, LocalShape
from bdlora_compile.fused_norm_paths import _reason as reason_to_stay
from bdlora_compile.fused_paths import fuse_paths
from bdlora_compile.fused_rotary import fuse_rotary
from bdlora_compile.ir import (
    BankSource,
    Captured,
    Layers,
    RankIndices,
    fake_tensor,
    operator_name,
    placeholders,
    record,
    set_record,
    stage_nodes,
)
from bdlora_compile.lora_nodes import LinearArguments, LinearBesideArguments, LinearBridgedArguments, RotateArguments
from bdlora_compile.lora_paths import Path
from bdlora_compile.passes.fuse import Fuse
from bdlora_compile.placement import Mesh
from bdlora_compile.printer import print_graph
from bdlora_compile.propagation import find_fake_mode, propagate
from bdlora_compile.regions import is_boundary, layer_boundary
from bdlora_compile.report import Refusal
from bdlora_compile.runtime import bridged_ops, norm_op
from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.sites import Role, Site
from bdlora_compile.transport import through_symmetric_memory
from tests.conftest import GoldenCheck
from tests.passes.graphs import GraphBuilder, plan_of, run
from tests.passes.test_fuse import count, merged, on_gpu
from tests.passes.test_fused_norms import TRANSPORT, norm_of_rows
from tests.passes.test_fused_rotary import Layer as RotaryLayer

LAYER = "model.layers.0"
OUT = Site(f"{LAYER}.self_attn.o_proj", Role.ROW, 8, 8)
GATE, UP = (Site(f"{LAYER}.mlp.{name}", Role.COLUMN, 8, 12) for name in ("gate_proj", "up_proj"))
DOWN = Site(f"{LAYER}.mlp.down_proj", Role.ROW, 12, 8)
SITES = (OUT, GATE, UP, DOWN)
NOBODY = "the kernel behind does not add what lies beside its product"
HALVES = "its halves are no gate and up of an activation"
MLP = f"{LAYER}.mlp.gate_proj+up_proj"
BESIDE = {Layout.LOCAL: "bdlora::lora_linear_beside", Layout.SLORA: "bdlora::lora_linear_bridged"}
Activation = Callable[[GraphBuilder, Node, Node], Node]


def silu_times(build: GraphBuilder, gate: Node, up: Node) -> Node:
    return build.call(torch.mul, build.call(torch.nn.functional.silu, gate), up)


def half_a_layer(
    ranks: int,
    activation: Activation = silu_times,
    dtype: torch.dtype = torch.float32,
    layout: Layout = Layout.LOCAL,
) -> Captured:
    """residual + o(sin(x)), its norm, and an MLP, through all passes and on symmetric memory where there are ranks."""
    build = GraphBuilder(dtype)
    x, residual, scale = build.input("x", 2, 3, 8), build.input("residual", 2, 3, 8), build.input("scale", 8)
    _, down = half(build, weights(build), x, residual, scale, activation)
    return compiled(build.finish(down), ranks, dtype, layout)


def weights(build: GraphBuilder) -> list[Node]:
    """Of all sites."""
    return [build.weight(f"{site.name}.weight", site.out_features, site.in_features) for site in SITES]


def half(
    build: GraphBuilder,
    matrices: list[Node],
    x: Node,
    residual: Node,
    scale: Node,
    activation: Activation = silu_times,
) -> tuple[Node, Node]:
    """(residual + o(sin(x)), the MLP of its norm)."""
    out, gate, up, down = matrices
    attended = build.linear(build.call(torch.sin, x), out, site=OUT.name)
    summed = build.call(torch.add, residual, attended)
    normed = norm_of_rows(build, summed, scale)["result"]
    inner = activation(build, build.linear(normed, gate, site=GATE.name), build.linear(normed, up, site=UP.name))
    return summed, build.linear(inner, down, site=DOWN.name)


def a_layer(ranks: int, dtype: torch.dtype = torch.float32, layout: Layout = Layout.LOCAL) -> Captured:
    """A whole layer between its boundaries: norms before and after, o and an MLP; behind a sum over the ranks."""
    build = GraphBuilder(dtype)
    x = build.input("x", 2, 3, 8)
    scales, matrices = [build.input(f"scale{index}", 8) for index in range(3)], weights(build)
    hidden = build.call(layer_boundary, x)
    normed = norm_of_rows(build, hidden, scales[0])["result"]
    summed, down = half(build, matrices, normed, hidden, scales[1])
    ended = build.call(layer_boundary, build.call(torch.add, summed, down))
    captured = build.finish(norm_of_rows(build, ended, scales[2])["result"])
    captured.layers = Layers("model.layers", (0, 0, 0))
    return compiled(captured, ranks, dtype, layout)


def compiled(captured: Captured, ranks: int, dtype: torch.dtype, layout: Layout) -> Captured:
    """The graph of rank 0, as it is before paths are fused."""
    plan = replace(plan_of(ranks, SITES, layout), dtype=dtype)
    mesh = Mesh(ranks, "group")
    run(Fuse(), merged(captured, plan), on_gpu(plan))
    for boundary in [node for node in captured.graph.nodes if is_boundary(node)][:1]:
        with captured.graph.inserting_before(boundary):
            _, summed = all_reduce(captured.graph, boundary.all_input_nodes[0], mesh)
        boundary.replace_input_with(boundary.all_input_nodes[0], summed)
    propagate(captured.graph, "sum")
    through_symmetric_memory(captured, TRANSPORT, mesh, 0)
    propagate(captured.graph, "emit")
    return captured


def test_norms_and_activations_add_lora(golden: GoldenCheck) -> None:
    """The norm that of o, the activation that of gate and up; nobody reads down."""
    captured = half_a_layer(2)
    stats = fuse_paths(captured)
    propagate(captured.graph, "emit")
    assert (stats.matches, stats.refusals) == (2, [Refusal(DOWN.name, NOBODY)])
    golden("fused_paths", print_graph(captured.graph))
    assert not count(captured, "silu")
    assert fuse_paths(captured).matches == 0, "a second time changes nothing"


def test_without_a_sum_of_ranks_the_activation_alone_does() -> None:
    captured = half_a_layer(1)
    stats = fuse_paths(captured)
    assert (stats.matches, stats.refusals) == (1, [Refusal(OUT.name, NOBODY), Refusal(DOWN.name, NOBODY)])
    assert count(captured, "bdlora::swiglu") == 1


@pytest.mark.parametrize("layout", [Layout.LOCAL, Layout.SLORA])
def test_down_is_left_to_the_norm_of_the_next_layer(layout: Layout, golden: GoldenCheck) -> None:
    """What it lacks goes over the boundary; nothing goes into the first layer."""
    captured = a_layer(2, layout=layout)
    stats = fuse_paths(captured)
    propagate(captured.graph, "emit")
    assert (stats.matches, stats.refusals) == (3, [])
    golden(f"fused_paths_of_a_layer_{layout.value}", print_graph(captured.graph))
    assert count(captured, "bdlora::lora_no_delta") == 1
    assert count(captured, BESIDE[layout]) == 3
    assert count(captured, "linear") == 0
    boundaries = [[is_boundary(node) for node in region] for region in _between_calls(captured)]
    assert boundaries == [[True] * 3] * 2, "side by side: one cut"
    assert fuse_paths(captured).matches == 0, "a second time changes nothing"


def test_without_known_layers_down_stays() -> None:
    """What was not traced layer by layer is one region: nothing says which norms are alike."""
    captured = a_layer(2)
    captured.layers = None
    stats = fuse_paths(captured)
    reasons = {refusal.where: refusal.reason for refusal in stats.refusals}
    assert stats.notes["paths"] == 3
    assert "not every layer" in reasons[DOWN.name]
    assert count(captured, "bdlora::lora_no_delta") == 0
    assert count(captured, BESIDE[Layout.LOCAL]) == 2, "o is the norm's, gate and up the activation's"


def test_all_layers_hand_on_or_none_does() -> None:
    layers = Layers("model.layers", (0, 1, 1))
    wide, narrow = (cast(Path, SimpleNamespace(y=a_product(size))) for size in (16, 8))
    assert reason_to_stay(layers, [wide, wide]) == ""
    assert "another layer" in reason_to_stay(layers, [wide, None])
    assert "other shapes" in reason_to_stay(layers, [wide, narrow])
    assert "not every layer" in reason_to_stay(layers, [wide])


def a_product(columns: int) -> Node:
    return GraphBuilder().input("x", 2, columns)


def test_what_sees_other_tokens_says_so() -> None:
    captured = half_a_layer(2)
    (token_slot,) = [node for node in placeholders(captured.graph) if node.name == "bank_token_slot"]
    with captured.graph.inserting_after(placeholders(captured.graph)[-1]):
        chosen = captured.graph.call_function(torch.clone, (token_slot,))
    chosen.meta = dict(token_slot.meta)
    (out,) = [node for node in stage_nodes(captured.graph, "bdlora::lora_linear") if record(node).site == OUT.name]
    out.replace_input_with(token_slot, chosen)
    reasons = {refusal.where: refusal.reason for refusal in fuse_paths(captured).refusals}
    assert reasons[OUT.name] == "its tokens are chosen in the graph"
    assert "chosen" not in reasons[DOWN.name]


def _between_calls(captured: Captured) -> list[list[Node]]:
    """Boundaries that lie side by side."""
    runs: list[list[Node]] = [[]]
    for node in captured.graph.nodes:
        if is_boundary(node):
            runs[-1].append(node)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def swapped(build: GraphBuilder, gate: Node, up: Node) -> Node:
    return silu_times(build, up, gate)


def relu_times(build: GraphBuilder, gate: Node, up: Node) -> Node:
    return build.call(torch.mul, build.call(torch.relu, gate), up)


def read_twice(build: GraphBuilder, gate: Node, up: Node) -> Node:
    return build.call(torch.add, silu_times(build, gate, up), up)


def of_the_same(build: GraphBuilder, gate: Node, up: Node) -> Node:
    build.call(torch.sin, gate)
    return build.call(torch.mul, build.call(torch.nn.functional.silu, up), up)


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (swapped, HALVES),
        (relu_times, HALVES),
        (read_twice, "its halves are read elsewhere too"),
        (of_the_same, "its halves are read elsewhere too"),
    ],
)
def test_other_activations_stay_and_say_why(activation: Activation, reason: str) -> None:
    captured = half_a_layer(1, activation)
    before = print_graph(captured.graph)
    stats = fuse_paths(captured)
    assert stats.matches == 0
    reasons = {refusal.where: refusal.reason for refusal in stats.refusals}
    assert (reasons[MLP], reasons[DOWN.name]) == (reason, NOBODY)
    assert print_graph(captured.graph) == before


def test_other_products_with_an_exchange_stay_and_say_why() -> None:
    captured = a_layer(2, layout=Layout.SLORA)
    (product,) = [node for node in stage_nodes(captured.graph, "linear") if record(node).site == OUT.name]
    x, weight = product.args[:2]
    with captured.graph.inserting_before(product):
        product.args = (captured.graph.call_function(torch.neg, (x,)), weight)
    reasons = {refusal.where: refusal.reason for refusal in fuse_paths(captured).refusals}
    assert reasons == {OUT.name: "its product reads another operand"}


def test_a_product_beside_its_lora_keeps_its_bias() -> None:
    """In either layout."""
    for layout, operator_of, known in (
        (Layout.LOCAL, "bdlora::lora_linear", LinearBesideArguments),
        (Layout.SLORA, "linear", LinearBridgedArguments),
    ):
        captured = a_layer(2, layout=layout)
        (product,) = [node for node in stage_nodes(captured.graph, operator_of) if record(node).site == OUT.name]
        bias = placeholders(captured.graph)[1]
        product.args = (*product.args[:2], bias, *product.args[3:])
        assert fuse_paths(captured).matches == 3
        pairs = {record(node).site: node for node in stage_nodes(captured.graph, f"bdlora::{known.OPERATOR}")}
        assert [known.of(pair).bias is bias for pair in pairs.values()] == [site == OUT.name for site in pairs]


def test_sites_that_write_a_part_of_their_product_stay_and_say_why() -> None:
    captured = half_a_layer(1)
    (product,) = [node for node in stage_nodes(captured.graph, "bdlora::lora_linear") if record(node).site == MLP]
    replace(LinearArguments.of(product), out_features=(12, 8)).write_to(product)
    reasons = {refusal.where: refusal.reason for refusal in fuse_paths(captured).refusals}
    assert reasons[MLP] == "its sites do not write all columns of their product"


def test_exchanges_by_the_process_group_stay_and_say_why() -> None:
    captured = a_layer(2, layout=Layout.SLORA)
    for node in [*stage_nodes(captured.graph, "bdlora::all_reduce")]:
        node.target = torch.ops._c10d_functional.all_reduce.default
        node.args = (node.args[0], "sum", "group")
    stats = fuse_paths(captured)
    assert stats.matches == 0
    assert {refusal.where for refusal in stats.refusals} == {OUT.name, MLP, DOWN.name}
    assert all("through symmetric memory" in refusal.reason for refusal in stats.refusals)


def bank_of_sites(ranks: int, dtype: torch.dtype, layout: Layout) -> AdapterBank:
    """Rank 0's part of two adapters of ranks 2 and 4 for all sites."""
    bank = AdapterBank([site.name for site in SITES], 2, 4096, 6, dtype, torch.device("cpu"))
    for slot, rank in enumerate((2, 4)):
        shapes = {site.name: _shape(site, rank, ranks, layout) for site in SITES}
        factors = {name: (_random_factors(shape, dtype), 2.0) for name, shape in shapes.items()}
        bank.write(slot, bank.stage(factors), bank.used_elements())
    bank.token_slot.copy_(torch.tensor([0, 1, -1, 1, 0, 0]))
    return bank


def _shape(site: Site, rank: int, ranks: int, layout: Layout) -> LocalShape:
    is_column = site.role is Role.COLUMN
    in_features = site.in_features // (1 if is_column else ranks)
    if layout is Layout.LOCAL:
        return LocalShape(rank, rank, 1, 1, in_features, site.out_features // (ranks if is_column else 1))
    return LocalShape(rank // ranks if is_column else rank, rank, 1, 1, in_features, site.out_features // ranks)


def _random_factors(shape: LocalShape, dtype: torch.dtype) -> LocalFactors:
    a, b = torch.randn(shape.a_rank, shape.in_features), torch.randn(shape.b_rank, shape.out_features)
    return LocalFactors(shape, a.to(dtype), b.to(dtype))


def result_of(captured: Captured, bank: AdapterBank) -> torch.Tensor:
    """On random values, the same in each call; sums over the ranks are left out."""
    for node in [*stage_nodes(captured.graph, "bdlora::all_reduce")]:
        node.replace_all_uses_with(node.all_input_nodes[0])
        captured.graph.erase_node(node)
    torch.manual_seed(0)
    values: list[Any] = []
    for node in placeholders(captured.graph):
        source, like = record(node).source, fake_tensor(node)
        if isinstance(source, BankSource):
            values.append(getattr(bank, source.field.value))
        elif isinstance(source, RankIndices):
            values.append(torch.arange(like.shape[0]))
        else:
            values.append(torch.randn(like.shape).to(like.dtype))
    (result,) = Interpreter(GraphModule(captured.module, captured.graph)).run(*values)
    assert isinstance(result, torch.Tensor)
    return result.float()


def last_site(ranks: int, dtype: torch.dtype, layout: Layout) -> Captured:
    return half_a_layer(ranks, dtype=dtype, layout=layout)


@pytest.mark.parametrize("layout", [Layout.LOCAL, Layout.SLORA])
@pytest.mark.parametrize("make", [last_site, a_layer], ids=["half", "whole"])
@pytest.mark.parametrize(("ranks", "dtype"), [(1, torch.float32), (2, torch.float32), (2, torch.bfloat16)])
def test_the_graph_computes_the_same(
    make: Callable[[int, torch.dtype, Layout], Captured],
    ranks: int,
    dtype: torch.dtype,
    layout: Layout,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the operators' plain implementations, each rank's sums its own; LoRA lies beside with bfloat16 alone.

    The same sums in the same order: equal but for where they are rounded, once to three times a value.
    """
    for module in (norm_op, bridged_ops):
        monkeypatch.setattr(module, "all_reduce", lambda x, *_: x)
    # Between o and the last norm of a whole layer are some roundings more.
    tolerance = (6 if make is last_site else 12) * torch.finfo(dtype).eps
    before, after = (make(ranks, dtype, layout) for _ in range(2))
    bank = bank_of_sites(ranks, dtype, layout)
    assert fuse_paths(after).matches == 1 + (ranks > 1) * (1 + (make is a_layer))
    wanted = result_of(before, bank)
    assert (result_of(after, bank) - wanted).abs().max() < tolerance * wanted.abs().max()
    for site in (0, len(SITES) - 1):
        kept = bank.scales.clone()
        bank.scales[site] = 0.0
        assert not (result_of(after, bank) - wanted).abs().max() < 4 * tolerance * wanted.abs().max(), "the twins"
        bank.scales.copy_(kept)


def rotation() -> Captured:
    """Attention's half of a layer behind a product with LoRA, rotations and the cache in one operator."""
    captured = RotaryLayer().finish()
    fuse_rotary(captured.graph)
    graph, bank = captured.graph, AdapterBank(["q", "k", "v"], 1, 16, 6, torch.float64, torch.device("cpu"))
    (product,) = [node for node in graph.nodes if operator_name(node) == "linear"]
    inputs = {
        "pool": bank.pool,
        "slots": bank.slots,
        "scales": bank.scales,
        "token_slot": bank.token_slot,
        "order": bank.token_slot,
        "segments": bank.token_slot.new_empty(6, 3),
    }
    nodes = {}
    for name, value in inputs.items():
        with graph.inserting_after(placeholders(graph)[-1]), find_fake_mode(graph):
            nodes[name] = graph.placeholder(name)
            nodes[name].meta["example_value"] = torch.empty(value.shape, dtype=value.dtype)
    with graph.inserting_before(product):
        x, weight = product.args
        more = {"x": x, "weight": weight, "bias": None, "sites": (0, 1, 2), "width": 4, "out_features": (32, 16, 16)}
        path = LinearArguments.taken_from(**nodes, **more).insert(graph)
    set_record(path, site="q, k and v")
    product.replace_all_uses_with(path)
    graph.erase_node(product)
    propagate(graph, "rotation")
    return captured


def test_the_rotation_adds_what_its_product_leaves(golden: GoldenCheck) -> None:
    captured = rotation()
    assert fuse_paths(captured).matches == 1
    assert count(captured, BESIDE[Layout.LOCAL]) == 1
    (rotation_node,) = stage_nodes(captured.graph, "bdlora::rotate_and_cache")
    assert RotateArguments.of(rotation_node).delta is not None
    golden("fused_paths_rotation", print_graph(captured.graph))
