"""Layers that are alike are compiled once: the graph keeps one of each kind and says which layers that one stands for.

    Before:  h0 = layer(embeddings, weights of 0); h1 = layer(h0, weights of 1); ... ; logits = head(h31)
    After:   h0 = layer(boundary(embeddings), weights of 0);  logits = head(boundary(h0))       and 0 stands for 0..31

Layers are alike if they do the same operations on values of the same shapes, dtypes and placements, and read the same
of what was computed before the layers; their weights, sites and cache differ by the layer's number alone. Compared
node by node, never by the class of a module. One value may go from a layer to the next.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from bdlora_compile.ir import (
    Captured,
    Fact,
    Layers,
    WeightSource,
    fake_value,
    is_tensor,
    layer_of,
    module_path,
    operator_name,
    placeholders,
    record,
    set_record,
)
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
            stack = _find_layers(captured.graph)
            kinds = [_kind(layer, stack.layers, context.plan) for layer in stack.layers]
            results = _results(stack)
        except _UnlikeError as unlike:
            return PassStats(refusals=[Refusal(unlike.where, unlike.reason)])
        first = {kind: number for number, kind in reversed([*enumerate(kinds)])}
        stands_in = tuple(first[kind] for kind in kinds)
        captured.layers = Layers(stack.prefix, stands_in)
        _keep(captured.graph, stack, results, captured.layers.kept)
        erased = len(stack.layers) - len(captured.layers.kept)
        return PassStats(matches=erased, notes={"layers": len(stack.layers), "kept": len(captured.layers.kept)})

    def verify(self, captured: Captured, context: PassContext) -> None:
        """Nothing beyond shapes: what is kept is as it was."""


class _UnlikeError(Exception):
    """Why the layers stay as they are."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason


@dataclass(slots=True)
class _Layer:
    """One layer of the graph.

    Attributes:
        number: of the layer in the model's list.
        path: module path.
        nodes: its calls, in order.
        carried: the value from before that no other layer reads: the result of the layer before.
    """

    number: int
    path: str
    nodes: list[Node] = field(default_factory=list)
    carried: Node | None = None


@dataclass(slots=True)
class _Stack:
    """The layers of a graph and the calls after them."""

    prefix: str
    layers: list[_Layer]
    tail: list[Node]


def _find_layers(graph: Graph) -> _Stack:
    """The graph's calls by layer, and what each layer gets from the one before.

    Raises:
        _UnlikeError: there are fewer than two, they are not run in order, or one reads more of another than its result.
    """
    layers: list[_Layer] = []
    tail: list[Node] = []
    for node in graph.nodes:
        path = layer_of(module_path(node))
        if node.op == "placeholder" or (path is None and not layers):
            continue
        if path is None:
            tail.append(node)
            continue
        if not layers or layers[-1].path != path:
            layers.append(_Layer(int(path.rpartition(".")[2]), path))
        # A call without a module between two of a layer belongs to it.
        layers[-1].nodes += [*tail, node]
        tail = []
    numbers = [layer.number for layer in layers]
    prefixes = {layer.path.rpartition(".")[0] for layer in layers}
    if len(layers) < 2 or len(prefixes) > 1 or numbers != list(range(len(layers))):
        text = ", ".join(layer.path for layer in layers[:4]) or "none"
        raise _UnlikeError(
            "layers of the graph", f"found {text}; two or more of one list, run once each in order, wanted"
        )
    layers[-1].nodes, writes = _without_trailing_writes(layers[-1].nodes)
    stack = _Stack(prefixes.pop(), layers, [*writes, *tail])
    _find_carried(layers)
    return stack


def _without_trailing_writes(nodes: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """Split off writes to values from before the layer that nothing reads afterwards (a cache's lengths grow)."""
    own = {*nodes}
    position = {node: index for index, node in enumerate(nodes)}

    def is_last_use(write: Node) -> bool:
        written = filter(is_tensor, write.all_input_nodes)
        return all(position.get(user, -1) <= position[write] for value in written for user in value.users)

    writes = [node for node in nodes if not node.users and own.isdisjoint(node.all_input_nodes) and is_last_use(node)]
    return [node for node in nodes if node not in writes], writes


def _find_carried(layers: Sequence[_Layer]) -> None:
    """Note the one value that each layer gets from the one before; for the first, what it alone reads."""
    owner = {node: layer.number for layer in layers for node in layer.nodes}
    second = {operand for node in layers[1].nodes for operand in node.all_input_nodes}
    for layer in layers:
        read = dict.fromkeys(operand for node in layer.nodes for operand in node.all_input_nodes)
        outside = [node for node in read if owner.get(node) != layer.number and not _is_weight_of(node, layer)]
        if layer.number == 0:
            candidates = [node for node in outside if node not in second]
        else:
            candidates = [node for node in outside if node in owner]
        if len(candidates) != 1 or owner.get(candidates[0], layer.number - 1) != layer.number - 1:
            names = ", ".join(node.name for node in candidates) or "nothing"
            raise _UnlikeError(layer.path, f"it reads {names} of other layers; one value of the layer before wanted")
        layer.carried = candidates[0]


def _is_weight_of(node: Node, layer: _Layer) -> bool:
    source = record(node).source if node.op == "placeholder" else None
    return isinstance(source, WeightSource) and source.parameter.startswith(f"{layer.path}.")


def _results(stack: _Stack) -> list[Node]:
    """What each layer hands on to the next, and the last one to what follows.

    Raises:
        _UnlikeError: something else of a layer is read outside it, or elsewhere.
    """
    readers = [*({*layer.nodes} for layer in stack.layers[1:]), None]
    found = []
    for layer, following in zip(stack.layers, readers, strict=True):
        own = {*layer.nodes}
        outside = {node: [user for user in node.users if user not in own] for node in layer.nodes}
        results = [node for node, users in outside.items() if users]
        elsewhere = [user for node in results for user in outside[node] if following and user not in following]
        if len(results) != 1 or elsewhere:
            names = ", ".join(node.name for node in results) or "nothing"
            also = f", also by {elsewhere[0].name}" if elsewhere else ""
            raise _UnlikeError(layer.path, f"{names} of it is read outside{also}; one value for the next layer wanted")
        found.append(results[0])
    return found


def _kind(layer: _Layer, layers: Sequence[_Layer], plan: ModelPlan) -> Hashable:
    """What a layer does, without its number."""
    own = {node: index for index, node in enumerate(layer.nodes)}
    result = next(index for node, index in own.items() if any(user not in own for user in node.users))
    return (result, *(_call(node, own, layer, plan) for node in layer.nodes))


def _call(node: Node, own: dict[Node, int], layer: _Layer, plan: ModelPlan) -> Hashable:
    def described(operand: Node) -> Any:
        return _operand(operand, own, layer, plan)

    args: Any = map_arg(node.args, described)
    kwargs: Any = map_arg(node.kwargs, described)
    if operator_name(node) == _CACHE_UPDATE and args[-1] == layer.number:
        args = (*args[:-1], "this layer")
    site = record(node).site
    role = (site.removeprefix(layer.path), plan.layouts[site]) if site else None
    return (node.op, node.target, repr(args), repr(kwargs), role, value_key(fake_value(node)))


def _operand(operand: Node, own: dict[Node, int], layer: _Layer, plan: ModelPlan) -> object:
    if operand in own:
        return ("own", own[operand])
    if operand is layer.carried:
        return ("carried",)
    if _is_weight_of(operand, layer):
        source = record(operand).source
        assert isinstance(source, WeightSource), "asked above"
        placement = plan.placement_of(source.parameter)
        return ("weight", source.parameter.removeprefix(layer.path), placement, value_key(fake_value(operand)))
    return ("shared", operand.name)


def _keep(graph: Graph, stack: _Stack, results: Sequence[Node], kept: Sequence[int]) -> None:
    """Join the kept layers by boundaries, and erase the others with their weights."""
    carried = stack.layers[0].carried
    assert carried is not None, "found with the layers"
    weights = [node for node in placeholders(graph) if isinstance(record(node).source, WeightSource)]
    used = {node for node in weights if node.users}
    for number in kept:
        layer = stack.layers[number]
        own = {*layer.nodes}
        assert layer.carried is not None, "found with the layers"
        boundary = _insert_boundary(graph, carried, layer.nodes[0])
        layer.carried.replace_all_uses_with(boundary, delete_user_cb=own.__contains__)
        carried = results[number]
    after = {*stack.tail, *graph.find_nodes(op="output")}
    last = results[-1]
    boundary = _insert_boundary(graph, carried, next(node for node in graph.nodes if node in after))
    last.replace_all_uses_with(boundary, delete_user_cb=after.__contains__)
    for write in [node for node in stack.tail if not node.users and node.op != "output"]:
        boundary.append(write)
    for layer in reversed(stack.layers):
        if layer.number not in kept:
            for node in reversed(layer.nodes):
                graph.erase_node(node)
    erase_unused(graph, [node for node in weights if node in used])


def _insert_boundary(graph: Graph, value: Node, before: Node) -> Node:
    with graph.inserting_before(before):
        boundary = graph.call_function(layer_boundary, (value,))
    boundary.meta["example_value"] = fake_value(value)
    set_record(boundary, stage="deduplicate")
    return boundary
