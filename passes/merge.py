"""Linear layers that read one input become one: q, k and v; gate and up. Their LoRA paths become one call.

    Before:  q = expand(linear(x, Wq), shrink(x, Aq), Bq)       k and v the same, each with its own collective (slora)
    After:   y = expand(linear(x, [Wq; Wk; Wv]), shrink(x, [Aq; Ak; Av]), [Bq; Bk; Bv])
             q, k, v = slices of y

Legal for any layers of one input, since rows of a weight do not see each other. A rank holds the merged weight in place
of the parts: its own rows of each, one below the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

import torch
from torch.fx import Graph, Node

from bdlora_compile import collectives
from bdlora_compile.factors import Layout
from bdlora_compile.ir import (
    Captured,
    Fact,
    MergedSource,
    Origin,
    WeightSource,
    fake_tensor,
    placeholders,
    record,
    set_record,
    stage_nodes,
)
from bdlora_compile.lora_nodes import ExpandArguments, ShrinkArguments, bridge_of, is_expand
from bdlora_compile.pass_manager import PassContext, erase_unused
from bdlora_compile.placement import Replicate, Shard
from bdlora_compile.plan import ModelPlan
from bdlora_compile.propagation import find_fake_mode
from bdlora_compile.report import PassStats, Refusal


@dataclass(frozen=True, slots=True)
class Merge:
    """One GEMM and one LoRA call for the layers that share an input."""

    name: ClassVar[str] = "merge"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PARTITIONED, Fact.LORA_LOCAL})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.MERGED})

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        matches, refusals = 0, []
        for branches in list(_groups(captured.graph, context.plan)):
            reason = _refusal(branches, context.plan)
            if reason:
                refusals.append(Refusal(_label(branches), reason))
                continue
            _merge(captured.graph, branches, context.plan)
            matches += 1
        return PassStats(matches=matches, refusals=refusals)

    def verify(self, captured: Captured, context: PassContext) -> None:
        """Nothing beyond shapes: the slices have the shapes of the layers that they replace."""


@dataclass(frozen=True, slots=True)
class _Branch:
    """One linear layer of a group, with its LoRA path if it has one.

    Attributes:
        linear: the base product.
        expand: what adds the LoRA path to it.
    """

    linear: Node
    expand: Node | None

    @property
    def result(self) -> Node:
        return self.expand or self.linear

    @property
    def parameters(self) -> list[Node]:
        """Weight, and bias where there is one."""
        return [node for node in self.linear.all_input_nodes if isinstance(record(node).source, WeightSource)]

    @property
    def out_features(self) -> int:
        return int(fake_tensor(self.linear).shape[-1])


def _groups(graph: Graph, plan: ModelPlan) -> Iterator[list[_Branch]]:
    """Linear layers of this rank's rows by the input that they read, in graph order; only where there are several."""
    by_input: dict[Node, list[_Branch]] = {}
    for linear in stage_nodes(graph, "linear"):
        x, weight = linear.args[:2]
        source = record(weight).source if isinstance(weight, Node) else None
        if not (isinstance(x, Node) and isinstance(weight, Node) and isinstance(source, WeightSource)):
            continue
        placement = record(weight).placement
        holds_rows = isinstance(placement, Replicate) or (isinstance(placement, Shard) and placement.dim == 0)
        if holds_rows and source.parameter not in plan.gathered:
            by_input.setdefault(x, []).append(_Branch(linear, _expand_of(linear)))
    return (branches for branches in by_input.values() if len(branches) > 1)


def _expand_of(linear: Node) -> Node | None:
    users = list(linear.users)
    is_site = len(users) == 1 and is_expand(users[0]) and users[0].args[0] is linear
    return users[0] if is_site else None


def _refusal(branches: Sequence[_Branch], plan: ModelPlan) -> str:
    """Why a group stays as it is; empty if nothing is in the way."""
    if len({len(branch.parameters) for branch in branches}) > 1:
        return "some of its layers have a bias and others none"
    if len({branch.expand is None for branch in branches}) > 1:
        return "some of its layers take adapters and others do not"
    if len({_layout([branch], plan) for branch in branches}) > 1:
        return "its LoRA sites have different layouts"
    return ""


def _merge(graph: Graph, branches: Sequence[_Branch], plan: ModelPlan) -> None:
    first = branches[0]
    parameters = [
        _merged_parameter(graph, nodes) for nodes in zip(*(branch.parameters for branch in branches), strict=True)
    ]
    x = first.linear.args[0]
    with graph.inserting_before(first.linear):
        y = graph.call_function(torch.nn.functional.linear, (x, *parameters))
        _describe(y, branches)
        if first.expand is not None:
            y = _merged_lora(graph, y, branches, plan)
        slices = _slices(graph, y, branches)
    for branch, part in zip(branches, slices, strict=True):
        _let_views_copy(branch.result)
        branch.result.replace_all_uses_with(part)
    erase_unused(graph, [node for branch in branches for node in _chain(branch)])


def _merged_parameter(graph: Graph, nodes: Sequence[Node]) -> Node:
    """A placeholder for the rows of all parts, one below the other."""
    parts = tuple((_parameter(node), record(node).placement) for node in nodes)
    with graph.inserting_after(placeholders(graph)[-1]):
        # The name becomes an argument of the graph's function: the first part's name makes it unique.
        merged = graph.placeholder(f"merged_{parts[0][0].replace('.', '_')}")
    values = [fake_tensor(node) for node in nodes]
    with find_fake_mode(graph):
        shape = (sum(value.shape[0] for value in values), *values[0].shape[1:])
        merged.meta["example_value"] = torch.empty(shape, dtype=values[0].dtype, device=values[0].device)
    set_record(merged, source=MergedSource(parts), placement=record(nodes[0]).placement, stage="merge")
    return merged


def _parameter(node: Node) -> str:
    source = record(node).source
    assert isinstance(source, WeightSource), f"{node.name}: only captured weights are merged"
    return source.parameter


def _merged_lora(graph: Graph, y: Node, branches: Sequence[_Branch], plan: ModelPlan) -> Node:
    """One shrink, one collective where the layout has one, and one expand for all branches."""
    expands = [ExpandArguments.of(branch.expand) for branch in branches if branch.expand is not None]
    shrinks = [ShrinkArguments.of(bridge_of(branch.expand)[0]) for branch in branches if branch.expand is not None]
    sites = [site for expand in expands for site in expand.sites]
    out_features = [size for expand in expands for size in expand.out_features]
    width = max(shrink.width for shrink in shrinks)
    nodes = [replace(shrinks[0], sites=sites, width=width).insert(graph)]
    if _layout(branches, plan) is Layout.SLORA and plan.mesh.size > 1:
        nodes += collectives.all_gather(graph, nodes[0], Shard(1, plan.mesh.size), plan.mesh)
    nodes.append(replace(expands[0], y=y, h=nodes[-1], sites=sites, out_features=out_features).insert(graph))
    for node in nodes:
        _describe(node, branches)
        set_record(node, origin=Origin.LORA, placement=Replicate())
    set_record(nodes[-1], placement=record(y).placement)
    return nodes[-1]


def _slices(graph: Graph, y: Node, branches: Sequence[_Branch]) -> list[Node]:
    starts = [0, *accumulate(branch.out_features for branch in branches)]
    parts = []
    for branch, start in zip(branches, starts, strict=False):
        part = graph.call_function(torch.narrow, (y, -1, start, branch.out_features))
        part.meta["nn_module_stack"] = branch.linear.meta.get("nn_module_stack")
        part.meta["stack_trace"] = branch.linear.meta.get("stack_trace")
        set_record(part, placement=record(branch.result).placement, site=record(branch.linear).site, stage="merge")
        parts.append(part)
    return parts


def _describe(node: Node, branches: Sequence[_Branch]) -> None:
    first = branches[0].linear
    node.meta["nn_module_stack"] = first.meta.get("nn_module_stack")
    node.meta["stack_trace"] = first.meta.get("stack_trace")
    set_record(node, placement=record(first).placement, site=_label(branches), stage="merge")


def _label(branches: Sequence[_Branch]) -> str:
    """``model.layers.0.self_attn.q_proj+k_proj+v_proj``."""
    names = [record(parameter).source for branch in branches for parameter in branch.parameters[:1]]
    paths = [source.parameter.removesuffix(".weight") for source in names if isinstance(source, WeightSource)]
    return "+".join([paths[0], *(path.rsplit(".", 1)[-1] for path in paths[1:])])


def _layout(branches: Sequence[_Branch], plan: ModelPlan) -> Layout | None:
    site = record(branches[0].linear).site
    return plan.layouts[site] if site else None


def _let_views_copy(value: Node) -> None:
    """A slice has gaps between its rows, which ``view`` may refuse and ``reshape`` does not."""
    for user in value.users:
        if user.op == "call_method" and user.target == "view":
            user.target = "reshape"


def _chain(branch: _Branch) -> list[Node]:
    """The nodes that the merged ones replace."""
    if branch.expand is None:
        return [branch.linear, *branch.parameters]
    shrink, bridge = bridge_of(branch.expand)
    return [branch.expand, *bridge, shrink, branch.linear, *branch.parameters]
