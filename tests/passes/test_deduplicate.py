"""Layers that are alike are compiled once."""

from dataclasses import replace

import torch
from torch.fx import Graph, GraphModule, Node

from bdlora_compile.ir import Captured, WeightSource, placeholders, record
from bdlora_compile.passes.deduplicate import Deduplicate
from bdlora_compile.plan import ModelPlan
from bdlora_compile.printer import print_graph
from bdlora_compile.regions import Step, split
from bdlora_compile.runtime.program import Flow
from bdlora_compile.sites import Role, Site
from tests.conftest import GoldenCheck
from tests.passes.graphs import GraphBuilder, plan_of, require_idempotent, run


def site(number: int) -> Site:
    return Site(f"model.layers.{number}.up", Role.COLUMN, 8, 8)


def decoder(*activations: str) -> tuple[Captured, ModelPlan, list[Node]]:
    """An embedding of sorts, a layer for each activation, a head; with the layers' results."""
    build = GraphBuilder()
    x, table = build.input("x", 2, 3, 8), build.weight("model.head.weight", 5, 8)
    angle = build.call(torch.cos, x)
    hidden, results = build.call(torch.sin, x), []
    for number, activation in enumerate(activations):
        build.layer = f"model.layers.{number}"
        up = build.linear(hidden, build.weight(f"{build.layer}.up.weight", 8, 8), site=f"{build.layer}.up")
        hidden = build.call(torch.add, hidden, build.call(activation, build.call(torch.mul, up, angle)))
        results.append(hidden)
    build.layer = ""
    captured = build.finish(build.linear(hidden, table))
    plan = plan_of(1, [site(number) for number in range(len(activations))])
    # A weight's placeholder comes before all calls, as Dynamo has it.
    first = next(node for node in captured.graph.nodes if node.op != "placeholder")
    for node in placeholders(captured.graph):
        first.prepend(node)
    return captured, plan, results


def weights(graph: Graph) -> list[str]:
    sources = [record(node).source for node in placeholders(graph)]
    return [source.parameter for source in sources if isinstance(source, WeightSource)]


def test_alike_layers_become_one(golden: GoldenCheck) -> None:
    captured, plan, _ = decoder("relu", "relu", "relu")
    stats = run(Deduplicate(), captured, plan)
    golden("deduplicate_three_layers", print_graph(captured.graph))
    assert (stats.matches, dict(stats.notes)) == (2, {"layers": 3, "kept": 1})
    assert captured.layers is not None
    assert captured.layers.stands_in == (0, 0, 0)
    assert weights(captured.graph) == ["model.head.weight", "model.layers.0.up.weight"]
    require_idempotent(Deduplicate(), captured, plan)


def test_layers_that_differ_are_kept_each() -> None:
    captured, plan, _ = decoder("relu", "tanh", "relu", "tanh", "tanh")
    run(Deduplicate(), captured, plan)
    assert captured.layers is not None
    assert captured.layers.stands_in == (0, 1, 0, 1, 1)


def test_a_result_that_is_read_outside_leaves_all_layers() -> None:
    """A forward that returns hidden states needs every layer's own."""
    captured, plan, results = decoder("relu", "relu")
    output = captured.graph.output_node()
    output.args = ((*output.args[0], results[0]),)  # type: ignore[misc]  # a tuple of nodes
    before = print_graph(captured.graph)
    stats = run(Deduplicate(), captured, plan)
    assert stats.matches == 0
    assert captured.layers is None
    assert print_graph(captured.graph) == before


def test_a_layer_that_reads_two_values_of_another_leaves_all_layers() -> None:
    captured, plan, results = decoder("relu", "relu", "relu")
    last = results[-1]
    last.args = (results[0], last.args[1])
    stats = run(Deduplicate(), captured, plan)
    assert stats.matches == 0
    assert "of the layer before wanted" in stats.refusals[0].reason


def test_regions_run_the_kept_layer_for_all() -> None:
    """The parts, run one after another with each layer's weights, compute what the whole graph computes."""
    whole, plan, _ = decoder("relu", "tanh", "relu")
    cut = whole.copy()
    run(Deduplicate(), cut, plan)
    regions = split(cut)
    assert regions.steps == [Step(0), Step(1, 0, 0), Step(2, 1, 1), Step(1, 0, 2), Step(3)]
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    values = {name: torch.randn(5 if "head" in name else 8, 8, dtype=torch.float64) for name in weights(whole.graph)}

    def result(of_layer: dict[int, int]) -> torch.Tensor:
        """``of_layer``: layers that run with another one's weights."""
        flow = Flow([x])
        for step in regions.steps:
            read = step if step.layer not in of_layer else replace(step, layer=of_layer[step.layer])
            bound = [values[it.parameter] if isinstance(it, WeightSource) else it for it in regions.sources(read)]
            flow.take(regions.modules[step.region](*flow.arguments(bound)))  # type: ignore[arg-type]  # no other kinds
        (logits,) = flow.carried
        assert isinstance(logits, torch.Tensor)
        return logits

    sources = [record(node).source for node in placeholders(whole.graph)]
    arguments = [values[source.parameter] if isinstance(source, WeightSource) else x for source in sources]
    (expected,) = GraphModule(whole.module, whole.graph)(*arguments)
    assert torch.equal(result({}), expected)
    assert not torch.equal(result({2: 1}), expected)
