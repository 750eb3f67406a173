"""Partition, localize and merge on one column site, one row site, and sites that share an input."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx import Node

from bdlora_compile.collectives import is_collective
from bdlora_compile.errors import PassError, PlacementError
from bdlora_compile.factors import Layout
from bdlora_compile.ir import Captured, Origin, operator_name, record, set_record
from bdlora_compile.lora_nodes import ExpandArguments, is_expand, is_shrink
from bdlora_compile.passes.localize import LocalizeLora
from bdlora_compile.passes.merge import Merge
from bdlora_compile.passes.partition import Partition
from bdlora_compile.plan import ModelPlan
from bdlora_compile.printer import print_graph
from bdlora_compile.sites import Role, Site
from tests.conftest import GoldenCheck
from tests.passes.graphs import GraphBuilder, plan_of, require_idempotent, run, shape_of

UP = Site("model.layers.0.mlp.up_proj", Role.COLUMN, in_features=8, out_features=12)
GATE = Site("model.layers.0.mlp.gate_proj", Role.COLUMN, in_features=8, out_features=12)
DOWN = Site("model.layers.0.mlp.down_proj", Role.ROW, in_features=12, out_features=8)
QUERY = Site("model.layers.0.self_attn.q_proj", Role.COLUMN, in_features=8, out_features=16, unit=4)
KEY = Site("model.layers.0.self_attn.k_proj", Role.COLUMN, in_features=8, out_features=8, unit=4)


def column_and_row() -> Captured:
    """down(relu(up(x)))."""
    build = GraphBuilder()
    x = build.input("x", 2, 3, 8)
    up = build.weight(f"{UP.name}.weight", 12, 8)
    down = build.weight(f"{DOWN.name}.weight", 8, 12)
    inner = build.call(torch.relu, build.linear(x, up, site=UP.name))
    return build.finish(build.linear(inner, down, site=DOWN.name))


def sharing(sites: tuple[Site, ...], bias: tuple[bool, ...]) -> Captured:
    """Linear layers of one input; their results leave as one sum each, so that no gather is asked for."""
    build = GraphBuilder()
    x = build.input("x", 2, 3, 8)
    weights = [build.weight(f"{site.name}.weight", site.out_features, 8) for site in sites]
    biases = [
        [build.weight(f"{site.name}.bias", site.out_features)] if has else []
        for site, has in zip(sites, bias, strict=True)
    ]
    results = [
        build.linear(x, weight, *own, site=site.name) for site, weight, own in zip(sites, weights, biases, strict=True)
    ]
    return build.finish(*(build.call("view", result, 2, 3, -1) for result in results))


def collectives(captured: Captured, origin: Origin) -> list[str]:
    return [
        operator_name(node).split("::")[-1]
        for node in captured.graph.nodes
        if is_collective(node) and record(node).origin is origin
    ]


@pytest.mark.parametrize("layout", list(Layout))
def test_stages_of_a_column_and_a_row_site(layout: Layout, golden: GoldenCheck) -> None:
    plan = plan_of(2, (UP, DOWN), layout)
    captured = column_and_row()
    texts = ["captured", print_graph(captured.graph)]
    for graph_pass in (Partition(), LocalizeLora(), Merge()):
        run(graph_pass, captured, plan)
        texts += [f"after {graph_pass.name}", print_graph(captured.graph)]
    golden(f"column_and_row_{layout.value}", "\n".join(texts))
    assert collectives(captured, Origin.BASE) == ["all_reduce"]
    lora = ["all_gather_into_tensor", "all_reduce"] if layout is Layout.SLORA else []
    assert collectives(captured, Origin.LORA) == lora


def test_partition_puts_lora_in_slora_placement() -> None:
    captured = column_and_row()
    run(Partition(), captured, plan_of(2, (UP, DOWN)))
    assert collectives(captured, Origin.LORA) == ["all_gather_into_tensor", "all_reduce"]


def test_partition_leaves_a_model_that_nothing_cuts() -> None:
    """The twin: whole weights without sites give the same graph on two ranks, and a second run is none."""
    captured = column_and_row()
    for node in captured.graph.nodes:
        set_record(node, site=None)
    before = print_graph(captured.graph)
    run(Partition(), captured, plan_of(2))
    assert print_graph(captured.graph) == before
    captured = column_and_row()
    plan = plan_of(2, (UP, DOWN))
    run(Partition(), captured, plan)
    require_idempotent(Partition(), captured, plan)


def test_tokens_that_are_chosen_in_an_unknown_way_are_an_error(golden: GoldenCheck) -> None:
    """Which slots belong to them cannot be told: wrong adapters would be used."""
    build = GraphBuilder()
    x, head = build.input("x", 2, 3, 8), build.weight("lm_head.weight", 11, 8)
    chosen = build.call("flip", build.call(torch.narrow, x, 1, 0, 2), 1)
    captured = build.finish(build.linear(chosen, head, site="lm_head"))
    captured.token_input = x
    plan = plan_of(2, (Site("lm_head", Role.COLUMN, 8, 11, vocabulary=True),), gathered=frozenset(["lm_head.weight"]))
    with pytest.raises(PlacementError) as caught:
        run(Partition(), captured, plan)
    golden("error_unknown_tokens", str(caught.value) + "\n")


def test_a_whole_bias_of_a_cut_layer_is_cut_at_run_time() -> None:
    """A plan that says nothing of a bias is still right: every rank takes its own part of the whole one."""
    plan = plan_of(2, (UP,))
    plan = replace(plan, weights={name: cut for name, cut in plan.weights.items() if not name.endswith("bias")})
    captured = sharing((UP,), (True,))
    run(Partition(), captured, plan, strict=False)
    assert [operator_name(node) for node in captured.graph.nodes].count("index_select") == 1


def test_partition_leaves_one_rank_without_collectives(golden: GoldenCheck) -> None:
    captured = column_and_row()
    run(Partition(), captured, plan_of(1, (UP, DOWN)))
    golden("column_and_row_one_rank", print_graph(captured.graph))
    assert not any(is_collective(node) for node in captured.graph.nodes)


def test_a_cut_value_as_output_is_an_error_that_names_it(golden: GoldenCheck) -> None:
    build = GraphBuilder()
    x, up = build.input("x", 2, 3, 8), build.weight(f"{UP.name}.weight", 12, 8)
    captured = build.finish(build.linear(x, up, site=UP.name))
    with pytest.raises(PlacementError) as caught:
        run(Partition(), captured, plan_of(2, (UP,)))
    golden("error_cut_output", str(caught.value) + "\n")


def test_a_cut_value_as_output_is_gathered_and_reported_when_not_strict() -> None:
    build = GraphBuilder()
    x, up = build.input("x", 2, 3, 8), build.weight(f"{UP.name}.weight", 12, 8)
    captured = build.finish(build.linear(x, up, site=UP.name))
    stats = run(Partition(), captured, plan_of(2, (UP,)), strict=False)
    assert [refusal.reason for refusal in stats.refusals] == ["it is an output of the model"]
    assert collectives(captured, Origin.FALLBACK) == ["all_gather_into_tensor"]


def test_localize_is_idempotent() -> None:
    plan = plan_of(2, (UP, DOWN))
    captured = column_and_row()
    run(Partition(), captured, plan)
    assert run(LocalizeLora(), captured, plan).matches == 2
    require_idempotent(LocalizeLora(), captured, plan)


def test_localize_leaves_slora_sites_and_says_why() -> None:
    plan = plan_of(2, (UP, DOWN), Layout.LOCAL, layouts={UP.name: Layout.SLORA})
    captured = column_and_row()
    run(Partition(), captured, plan)
    stats = run(LocalizeLora(), captured, plan)
    assert [(refusal.where, stats.matches) for refusal in stats.refusals] == [(UP.name, 1)]
    assert collectives(captured, Origin.LORA) == ["all_gather_into_tensor"]


def test_localize_refuses_arithmetic_between_the_factors(golden: GoldenCheck) -> None:
    """Something else than communication between A and B is not S-LoRA: removing it would change the result."""
    plan = plan_of(2, (UP, DOWN))
    captured = column_and_row()
    run(Partition(), captured, plan)
    expand = next(node for node in captured.graph.nodes if is_expand(node))
    arguments = ExpandArguments.of(expand)
    with captured.graph.inserting_before(expand):
        changed = captured.graph.call_function(torch.relu, (arguments.h,))
    replace(arguments, h=changed).write_to(expand)
    with pytest.raises(PassError) as caught:
        run(LocalizeLora(), captured, plan)
    golden("error_arithmetic_between_factors", str(caught.value) + "\n")


def partitioned_and_localized(captured: Captured, plan: ModelPlan) -> Captured:
    run(Partition(), captured, plan, strict=False)
    run(LocalizeLora(), captured, plan)
    return captured


def linears(captured: Captured) -> list[Node]:
    return [node for node in captured.graph.nodes if operator_name(node) == "linear"]


@pytest.mark.parametrize("layout", list(Layout))
def test_merge_of_gate_and_up(layout: Layout, golden: GoldenCheck) -> None:
    plan = plan_of(2, (GATE, UP), layout)
    captured = partitioned_and_localized(sharing((GATE, UP), (False, False)), plan)
    before = collectives(captured, Origin.LORA)
    assert run(Merge(), captured, plan).matches == 1
    golden(f"merge_{layout.value}", print_graph(captured.graph))
    assert len(linears(captured)) == 1
    assert sum(is_shrink(node) for node in captured.graph.nodes) == 1
    after = collectives(captured, Origin.LORA)
    assert (len(before), len(after)) == ((2, 1) if layout is Layout.SLORA else (0, 0))
    require_idempotent(Merge(), captured, plan)


def test_merge_with_fewer_kv_heads_than_ranks(golden: GoldenCheck) -> None:
    """Four ranks, four query heads, two key heads: slices of different size and placement."""
    plan = plan_of(4, (QUERY, KEY))
    captured = partitioned_and_localized(sharing((QUERY, KEY), (False, False)), plan)
    run(Merge(), captured, plan)
    golden("merge_fewer_kv_heads", print_graph(captured.graph))
    assert shape_of(linears(captured)[0]) == [2, 3, 16 // 4 + 8 // 2]


def test_merge_with_biases() -> None:
    plan = plan_of(2, (GATE, UP))
    captured = partitioned_and_localized(sharing((GATE, UP), (True, True)), plan)
    assert run(Merge(), captured, plan).matches == 1
    assert len(linears(captured)[0].all_input_nodes) == 3


@pytest.mark.parametrize(
    ("sites", "bias", "layouts", "reason"),
    [
        ((GATE, UP), (True, False), {}, "some of its layers have a bias and others none"),
        ((GATE, UP), (False, False), {UP.name: Layout.SLORA}, "its LoRA sites have different layouts"),
    ],
)
def test_merge_leaves_what_does_not_fit_and_says_why(sites: Any, bias: Any, layouts: Any, reason: str) -> None:
    plan = plan_of(2, sites, layouts=layouts)
    captured = partitioned_and_localized(sharing(sites, bias), plan)
    before = print_graph(captured.graph)
    stats = run(Merge(), captured, plan)
    assert (stats.matches, [refusal.reason for refusal in stats.refusals]) == (0, [reason])
    assert print_graph(captured.graph) == before


def test_merge_leaves_layers_of_different_inputs() -> None:
    plan = plan_of(2, (UP, DOWN))
    captured = partitioned_and_localized(column_and_row(), plan)
    require_idempotent(Merge(), captured, plan)
