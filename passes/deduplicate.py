"""Layers that are alike are compiled once: the graph keeps one of each kind and says which layers that one stands for.

    Before:  h0 = layer(embeddings, weights of 0); h1 = layer(h0, weights of 1); ... ; logits = head(h31)
    After:   h0 = layer(boundary(embeddings), weights of 0);  logits = head(boundary(h0))       and 0 stands for 0..31

Layers are alike if they do the same operations on values of the same shapes, dtypes and placements, and read the same
of what was computed before the layers; their weights, sites and cache differ by the layer's number alone. Compared
node by node, never by the class of a module. One value may go from a layer to the next.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from bdlora_compile.ir import (
    Captured,
    Fact,
    Layers,
    WeightSource,
    fake_value,
    layer_of,
    module_path,
    operator_name,
    placeholders,
    record,
    set_record,
)
from bdlora_compile.layers import Layer, LayerStack, UnlikeLayersError, find_layers, is_weight_of
from bdlora_compile.pass_manager import PassContext, erase_unused
from bdlora_compile.plan import ModelPlan
from bdlora_compile.propagation import value_key
from bdlora_compile.regions import layer_boundary
from bdlora_compile.report import PassStats, Refusal

_CACHE_UPDATE = "bdlora::cache_update"


@dataclass(frozen=True, slots=True)
class Deduplicate:
    """Keep one of each kind of layer."""

    name: ClassVar[str] = "deduplicate"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL, Fact.TAGGED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.DEDUPLICATED})

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        if captured.layers is not None:
            return PassStats()
        try:
            stack = find_layers(captured.graph)
        except UnlikeLayersError as unlike:
            return PassStats(refusals=[Refusal(unlike.where, unlike.reason)])
        kinds = [_kind(layer, context.plan) for layer in stack.layers]
        first = {kind: number for number, kind in reversed([*enumerate(kinds)])}
        stands_in = tuple(first[kind] for kind in kinds)
        captured.layers = Layers(stack.prefix, stands_in)
        _keep(captured.graph, stack, captured.layers.kept)
        erased = len(stack.layers) - len(captured.layers.kept)
        return PassStats(matches=erased, notes={"layers": len(stack.layers), "kept": len(captured.layers.kept)})

    def verify(self, captured: Captured, context: PassContext) -> None:
        """Nothing beyond shapes: what is kept is as it was."""


def _kind(layer: Layer, plan: ModelPlan) -> Hashable:
    """What a layer does, without its number."""
    own = {node: index for index, node in enumerate(layer.nodes)}
    return (own[layer.result], *(_call(node, own, layer, plan) for node in layer.nodes))


def _call(node: Node, own: dict[Node, int], layer: Layer, plan: ModelPlan) -> Hashable:
    def described(operand: Node) -> Any:
        return _operand(operand, own, layer, plan)

    args: Any = map_arg(node.args, described)
    kwargs: Any = map_arg(node.kwargs, described)
    if operator_name(node) == _CACHE_UPDATE and args[-1] == layer.number:
        args = (*args[:-1], "this layer")
    site = record(node).site
    role = (site.removeprefix(layer.path), plan.layouts[site]) if site else None
    return (node.op, node.target, repr(args), repr(kwargs), role, value_key(fake_value(node)))


def _operand(operand: Node, own: dict[Node, int], layer: Layer, plan: ModelPlan) -> object:
    if operand in own:
        return ("own", own[operand])
    if operand is layer.carried:
        return ("carried",)
    if is_weight_of(operand, layer.path):
        source = record(operand).source
        assert isinstance(source, WeightSource), "asked above"
        placement = plan.placement_of(source.parameter)
        return ("weight", source.parameter.removeprefix(layer.path), placement, value_key(fake_value(operand)))
    return ("shared", operand.name)


def _keep(graph: Graph, stack: LayerStack, kept: Sequence[int]) -> None:
    """Join the kept layers by boundaries, and erase the others with their weights."""
    weights = [node for node in placeholders(graph) if isinstance(record(node).source, WeightSource) and node.users]
    carried = stack.layers[0].carried
    for layer in (stack.layers[number] for number in kept):
        boundary = _insert_boundary(graph, carried, layer.nodes[0])
        layer.carried.replace_all_uses_with(boundary, delete_user_cb={*layer.nodes}.__contains__)
        carried = layer.result
    after = [*stack.tail, graph.output_node()]
    boundary = _insert_boundary(graph, carried, next(node for node in after if not layer_of(module_path(node))))
    stack.layers[-1].result.replace_all_uses_with(boundary, delete_user_cb=after.__contains__)
    for write in reversed([node for node in stack.tail if layer_of(module_path(node))]):
        boundary.append(write)
    for layer in reversed(stack.layers):
        if layer.number not in kept:
            for node in reversed(layer.nodes):
                graph.erase_node(node)
    erase_unused(graph, weights)


def _insert_boundary(graph: Graph, value: Node, before: Node) -> Node:
    with graph.inserting_before(before):
        boundary = graph.call_function(layer_boundary, (value,))
    boundary.meta["example_value"] = fake_value(value)
    set_record(boundary, stage="deduplicate")
    return boundary
