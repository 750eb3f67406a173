"""Fusing a LoRA path into one in-place operator."""

from dataclasses import replace

import torch

from bdlora_compile.factors import Layout
from bdlora_compile.ir import Captured, operator_name, stage_nodes
from bdlora_compile.lora_nodes import LinearArguments, ShrinkArguments
from bdlora_compile.passes.drop_lora import DropLora
from bdlora_compile.passes.fuse import Fuse
from bdlora_compile.passes.localize import LocalizeLora
from bdlora_compile.passes.merge import Merge
from bdlora_compile.passes.partition import Partition
from bdlora_compile.plan import ModelPlan
from bdlora_compile.printer import print_graph
from tests.conftest import GoldenCheck
from tests.passes.graphs import GraphBuilder, plan_of, require_idempotent, run
from tests.passes.test_lora_passes import DOWN, UP, column_and_row


def merged(captured: Captured, plan: ModelPlan) -> Captured:
    for graph_pass in (Partition(), LocalizeLora(), Merge()):
        run(graph_pass, captured, plan, strict=False)
    return captured


def count(captured: Captured, name: str) -> int:
    return sum(operator_name(node) == name for node in captured.graph.nodes)


def test_local_paths_become_one_operator_each(golden: GoldenCheck) -> None:
    plan = plan_of(2, (UP, DOWN))
    captured = merged(column_and_row(), plan)
    assert run(Fuse(), captured, plan).matches == 2
    golden("fuse_column_and_row", print_graph(captured.graph))
    assert count(captured, "bdlora::lora_apply_") == 2
    assert count(captured, "bdlora::lora_work") == 1
    assert count(captured, "bdlora::lora_shrink") == 0
    require_idempotent(Fuse(), captured, plan)


def on_gpu(plan: ModelPlan) -> ModelPlan:
    return replace(plan, device=torch.device("cuda"))


def test_on_gpus_a_path_and_its_product_become_one(golden: GoldenCheck) -> None:
    plan = on_gpu(plan_of(2, (UP, DOWN)))
    captured = merged(column_and_row(), plan)
    assert run(Fuse(), captured, plan).matches == 2
    golden("fuse_column_and_row_gpu", print_graph(captured.graph))
    require_idempotent(Fuse(), captured, plan)
    run(DropLora(), captured, plan)
    golden("drop_lora_column_and_row", print_graph(captured.graph))


def test_on_gpus_a_product_keeps_its_bias() -> None:
    """Also where LoRA is dropped again."""
    plan = on_gpu(plan_of(1, (UP,)))
    build = GraphBuilder()
    x, up, bias = build.input("x", 2, 3, 8), build.weight(UP.weight, 12, 8), build.weight(f"{UP.name}.bias", 12)
    captured = merged(build.finish(build.call(torch.relu, build.linear(x, up, bias, site=UP.name))), plan)
    assert run(Fuse(), captured, plan).matches == 1
    (product,) = stage_nodes(captured.graph, "bdlora::lora_linear")
    assert LinearArguments.of(product).bias is bias
    run(DropLora(), captured, plan)
    (product,) = stage_nodes(captured.graph, "linear")
    assert product.args == (x, up, bias)


def test_on_gpus_slots_that_are_made_on_the_way_keep_the_path_behind_its_product() -> None:
    """Beside the product its kernels would read them while the kernel ahead may still write them."""
    plan = on_gpu(plan_of(2, (UP, DOWN)))
    captured = merged(column_and_row(), plan)
    shrink, *_ = stage_nodes(captured.graph, "bdlora::lora_shrink")
    expand, *_ = stage_nodes(captured.graph, "bdlora::lora_expand")
    given = ShrinkArguments.of(shrink).token_slot
    with captured.graph.inserting_before(shrink):
        made = captured.graph.call_function(torch.clone, (given,))
    made.meta.update(given.meta)
    for node in (shrink, expand):
        node.replace_input_with(given, made)
    assert run(Fuse(), captured, plan).matches == 2
    assert (count(captured, "bdlora::lora_apply_"), count(captured, "bdlora::lora_linear")) == (1, 1)


def test_on_gpus_paths_with_a_collective_share_their_grouping(golden: GoldenCheck) -> None:
    plan = on_gpu(plan_of(2, (UP, DOWN), Layout.SLORA))
    captured = merged(column_and_row(), plan)
    stats = run(Fuse(), captured, plan)
    assert {refusal.reason for refusal in stats.refusals} == {"a collective lies between its factors"}
    golden("fuse_slora_gpu", print_graph(captured.graph))
    require_idempotent(Fuse(), captured, plan)
    run(DropLora(), captured, plan)
    golden("drop_lora_column_and_row", print_graph(captured.graph))


def test_paths_with_a_collective_are_left_and_say_why() -> None:
    plan = plan_of(2, (UP, DOWN), Layout.SLORA)
    captured = merged(column_and_row(), plan)
    before = print_graph(captured.graph)
    stats = run(Fuse(), captured, plan)
    assert (stats.matches, len(stats.refusals)) == (0, 2)
    assert {refusal.reason for refusal in stats.refusals} == {"a collective lies between its factors"}
    assert print_graph(captured.graph) == before


def test_a_base_output_that_is_read_elsewhere_is_left() -> None:
    """Adding in place would change what the other reader sees."""
    plan = plan_of(1, (UP,))
    build = GraphBuilder()
    x, up = build.input("x", 2, 3, 8), build.weight(f"{UP.name}.weight", 12, 8)
    captured = build.finish(build.call(torch.relu, build.linear(x, up, site=UP.name)))
    merged(captured, plan)
    base = next(node for node in captured.graph.nodes if operator_name(node) == "linear")
    output = captured.graph.output_node()
    output.args = ((*output.args[0], base),)  # type: ignore[misc]  # a tuple of nodes
    stats = run(Fuse(), captured, plan)
    assert [refusal.reason for refusal in stats.refusals] == ["its base output is read elsewhere too"]
