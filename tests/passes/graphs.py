"""Small graphs by hand, in the form that Dynamo and the tag pass would leave them in."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from bdlora_compile.factors import Layout
from bdlora_compile.hollow import HollowTag
from bdlora_compile.ir import Captured, Fact, InputSource, WeightSource, fake_value, set_record
from bdlora_compile.pass_manager import GraphPass, PassContext
from bdlora_compile.placement import Mesh, Placement, Shard
from bdlora_compile.plan import ModelPlan
from bdlora_compile.printer import print_graph
from bdlora_compile.propagation import propagate
from bdlora_compile.report import PassStats
from bdlora_compile.runtime.deployment import Deployment
from bdlora_compile.sites import Role, Site

TAGGED = frozenset({Fact.CANONICAL, Fact.TAGGED})
"""What holds for a graph that this module makes."""


def plan_of(
    ranks: int,
    sites: Sequence[Site] = (),
    layout: Layout = Layout.LOCAL,
    weights: Mapping[str, Placement] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    gathered: frozenset[str] = frozenset(),
) -> ModelPlan:
    """A plan in which column sites split their rows, row sites their columns."""
    placements: dict[str, Placement] = {
        f"{site.name}.weight": Shard(0 if site.role is Role.COLUMN else 1, min(ranks, site.num_units))
        for site in sites
        if ranks > 1 and min(ranks, site.num_units) > 1 and not site.vocabulary
    }
    placements |= {site.weight: Shard(0, ranks) for site in sites if site.vocabulary and ranks > 1}
    placements |= {
        name.replace(".weight", ".bias"): placement
        for name, placement in placements.items()
        if isinstance(placement, Shard) and placement.dim == 0
    }
    return ModelPlan(
        model="Hand",
        mesh=Mesh(ranks, "group"),
        sites={site.name: site for site in sites},
        layouts={site.name: layout for site in sites} | dict(layouts or {}),
        weights=placements | dict(weights or {}),
        gathered=gathered,
        max_rank=4,
        max_local_rank=4,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )


class GraphBuilder:
    """Adds nodes with fake values and records, floating-point ones in ``dtype`` unless another is asked for."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.graph = Graph()
        self.dtype = dtype
        self.layer = ""
        """Module path of the layer that calls made next belong to."""
        self._mode = FakeTensorMode()
        self._count = 0

    def input(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Node:
        """An argument of the forward."""
        node = self._placeholder(name, shape, dtype or self.dtype)
        set_record(node, source=InputSource(self._count))
        self._count += 1
        return node

    def weight(self, parameter: str, *shape: int, placement: Placement | None = None) -> Node:
        """A parameter; ``placement`` where the graph is partitioned already."""
        node = self._placeholder(parameter.replace(".", "_"), shape, self.dtype)
        # What Dynamo leaves there and the tag pass reads: the hollow parameter, which knows its name.
        hollow = SimpleNamespace(bdlora_tag=HollowTag(parameter, cast(Deployment, None)))
        node.meta["grapharg"] = SimpleNamespace(example=hollow)
        set_record(node, source=WeightSource(parameter, shape))
        if placement is not None:
            set_record(node, placement=placement)
        self._count += 1
        return node

    def call(self, target: Any, *args: Any, site: str | None = None, placement: Placement | None = None) -> Node:
        """A call of a function, or of a method where ``target`` is a name."""
        make = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node: Node = make(target, args)
        if self.layer:
            node.meta["nn_module_stack"] = {"layer": (self.layer, nn.Module)}
        if site:
            set_record(node, site=site)
        if placement is not None:
            set_record(node, placement=placement)
        return node

    def linear(self, x: Node, weight: Node, *bias: Node, site: str | None = None) -> Node:
        """A linear layer."""
        return self.call(torch.nn.functional.linear, x, weight, *bias, site=site)

    def finish(self, *outputs: Node, facts: frozenset[Fact] = TAGGED) -> Captured:
        """The graph with its values propagated."""
        self.graph.output(outputs)
        propagate(self.graph, "hand")
        return Captured(nn.Module(), self.graph, facts)

    def _placeholder(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Node:
        node = self.graph.placeholder(name)
        with self._mode:
            node.meta["example_value"] = torch.empty(shape, dtype=dtype)
        return node


def run(graph_pass: GraphPass, captured: Captured, plan: ModelPlan, strict: bool = True) -> PassStats:
    """One pass as the runner runs it, shapes verified."""
    context = PassContext(plan, strict)
    stats = graph_pass.rewrite(captured, context)
    captured.graph.lint()
    propagate(captured.graph, graph_pass.name)
    graph_pass.verify(captured, context)
    captured.facts |= graph_pass.establishes
    return stats


def require_unchanged(graph_pass: GraphPass, captured: Captured, plan: ModelPlan) -> PassStats:
    """A run of the pass changes nothing."""
    before = print_graph(captured.graph)
    stats = run(graph_pass, captured, plan)
    assert print_graph(captured.graph) == before
    return stats


def require_idempotent(graph_pass: GraphPass, captured: Captured, plan: ModelPlan) -> None:
    """A second run of a pass finds nothing and changes nothing."""
    assert require_unchanged(graph_pass, captured, plan).matches == 0


def shape_of(node: Node) -> list[int]:
    """Sizes of a node's value."""
    value = fake_value(node)
    assert isinstance(value, torch.Tensor)
    return list(value.shape)
