"""Put copies of traced layers in the place of the layers that are like them: the graph that Dynamo would have captured.

Before:  h1 = layer_output(layer 0 of layer_input(h0, [mask]));  h2 = layer_again(h1, [mask], like=0, layer=1)
After:   h1 = layer 0 of h0;  h2 = layer 0 of h1 with the weights, the part of the cache and the path of layer 1

It comes before the passes, which see a graph that holds every layer, whether Dynamo traced it or not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from bdlora_compile.hollow import tag_of
from bdlora_compile.ir import Captured, fake_value, module_path, placeholders, plain_path
from bdlora_compile.propagation import value_key
from bdlora_compile.stand_ins import StandInError, StandIns

_OPS = torch.ops.bdlora


@dataclass(frozen=True, slots=True)
class _Twin:
    """What Dynamo says of an argument, of a parameter that it did not see: where it is found, and the value."""

    source: "_Named"
    example: nn.Parameter


@dataclass(frozen=True, slots=True)
class _Named:
    name: str


@dataclass(frozen=True, slots=True)
class _Traced:
    """A layer that Dynamo traced for others.

    Attributes:
        number: of the layer.
        start: its `layer_input`.
        nodes: its calls, in order.
        result: what it hands on.
    """

    number: int
    start: Node
    nodes: Sequence[Node]
    result: Node


def unfold(captured: Captured, stand_ins: StandIns | None) -> str:
    """Change the graph in place; returns for the report which layers Dynamo traced, empty for a model without layers.

    Raises:
        StandInError: a layer cannot stand in for another after all; nothing of the graph may be used.
    """
    if stand_ins is None:
        return ""
    graph = captured.graph
    traced = _traced_layers(graph)
    again = _calls(graph, _OPS.layer_again.default)
    weights = _WeightsOfTwins(graph, stand_ins)
    for call in again:
        layer = traced.get(call.args[3])
        if layer is None:
            raise _unlike(call, f"no layer {call.args[3]} in one piece", "the layer that it is like in the same graph")
        _put_copy(graph, layer, call, weights)
    for layer in traced.values():
        (end,) = [user for user in layer.result.users if user.target is _OPS.layer_output.default]
        end.replace_all_uses_with(layer.result)
        graph.erase_node(end)
        layer.start.replace_all_uses_with(_operand(layer.start))
        graph.erase_node(layer.start)
    return stand_ins.text(len(stand_ins.layers) - len(again), len(again))


def _calls(graph: Graph, target: Any) -> Sequence[Node]:
    return graph.find_nodes(op="call_function", target=target)


def _operand(node: Node) -> Node:
    operand = node.args[0]
    assert isinstance(operand, Node), f"{node.name}: a layer gets a value of the graph"
    return operand


def _traced_layers(graph: Graph) -> dict[Any, _Traced]:
    """Layers between `layer_input` and `layer_output` whose values nothing else reads or is read in their place."""
    starts = {node.args[3]: node for node in _calls(graph, _OPS.layer_input.default)}
    ends = {node.args[1]: node for node in _calls(graph, _OPS.layer_output.default)}
    if starts.keys() != ends.keys():
        node = next(starts[number] for number in starts if number not in ends)
        raise _unlike(node, "a layer that does not return one tensor", "one tensor")
    order = {node: index for index, node in enumerate(graph.nodes)}
    first = min((order[node] for node in starts.values()), default=0)
    found = {}
    number: Any  # of a node's arguments
    for number, start in starts.items():
        nodes = []
        node = start.next
        while node is not ends[number]:
            nodes.append(node)
            node = node.next
        layer = _Traced(number, start, nodes, _operand(ends[number]))
        _require_closed(layer, ends[number], {node for node, index in order.items() if index < first})
        found[number] = layer
    return found


def _require_closed(layer: _Traced, end: Node, before: set[Node]) -> None:
    """Only the result is read outside, and only what comes before all layers is read inside."""
    own = {layer.start, *layer.nodes}
    outside = [user for node in own for user in node.users if user not in own and user is not end]
    if outside:
        raise _unlike(outside[0], f"a value from inside of layer {layer.number}", "that its result alone is read")
    known = {*before, _operand(layer.start)}
    others = [one for node in layer.nodes for one in node.all_input_nodes if one not in own and one not in known]
    if others:
        raise _unlike(others[0], f"read in layer {layer.number}", "values from before the layers")


def _put_copy(graph: Graph, layer: _Traced, call: Node, weights: "_WeightsOfTwins") -> None:
    number: Any = call.args[4]
    copies = _arguments(layer, call)
    with graph.inserting_before(call):
        for node in layer.nodes:
            copy = graph.node_copy(node, lambda one: copies[one] if one in copies else weights.of(one, layer, number))
            _renumber(copy, weights.path(layer.number), weights.path(number), layer.number, number)
            copies[node] = copy
    if value_key(fake_value(layer.result)) != value_key(fake_value(call)):
        raise _unlike(call, f"a result of layer {layer.number} that is laid out otherwise", "a result like its input")
    call.replace_all_uses_with(copies[layer.result])
    graph.erase_node(call)


def _arguments(layer: _Traced, call: Node) -> dict[Node, Node]:
    """What the copy reads where the traced layer reads its arguments.

    Python saw of tensors only what `value_key` holds: with the same of each, it does the same.
    """
    old: list[Any] = [_operand(layer.start), *layer.start.args[1]]  # type: ignore[misc, union-attr]  # a list
    new: list[Any] = [_operand(call), *call.args[1]]  # type: ignore[misc, union-attr]  # a list
    if len(old) != len(new) or layer.start.args[2] != call.args[2]:
        raise _unlike(call, f"arguments {call.args[2]}", f"those of layer {layer.number}: {layer.start.args[2]}")
    mapping = {layer.start: new[0]}
    for one, other in zip(old, new, strict=True):
        key = value_key(fake_value(one))
        if key is None or key != value_key(fake_value(other)) or mapping.setdefault(one, other) is not other:
            raise _unlike(call, f"{other.name}: {fake_value(other)}", f"{one.name} as for layer {layer.number}")
    return mapping


def _renumber(copy: Node, old: str, new: str, number: int, other: int) -> None:
    """Paths and the part of the cache are the other layer's."""
    if copy.target is _OPS.cache_update.default:
        *rest, part = copy.args
        if part != number:
            raise _unlike(copy, f"part {part} of the cache", f"that of layer {number}")
        copy.args = (*rest, other)
    if copy.target is _OPS.shard_only.default:
        copy.args = (copy.args[0], str(copy.args[1]).replace(f"{old}.", f"{new}.", 1))
    stack = copy.meta.get("nn_module_stack")
    if stack:
        paths = {key: (plain_path(str(path)), cls) for key, (path, cls) in stack.items()}
        copy.meta["nn_module_stack"] = {
            key: (f"{new}{path.removeprefix(old)}" if f"{path}.".startswith(f"{old}.") else path, cls)
            for key, (path, cls) in paths.items()
        }


class _WeightsOfTwins:
    """Placeholders of the weights of layers that Dynamo did not trace, each made when it is first needed."""

    def __init__(self, graph: Graph, stand_ins: StandIns) -> None:
        self._graph = graph
        self._stand_ins = stand_ins
        self._by_name = {tag.name: node for node in placeholders(graph) if (tag := _tag_of(node)) is not None}
        self._twins: dict[tuple[int, int], Mapping[str, nn.Parameter]] = {}
        # Behind the others: the place of a placeholder is the place of an argument.
        self._place = next(node for node in graph.nodes if node.op != "placeholder")

    def path(self, number: int) -> str:
        """Of a layer."""
        return f"{self._stand_ins.path}.{number}"

    def of(self, node: Node, layer: _Traced, number: int) -> Node:
        """What layer ``number`` reads where the traced layer reads a value from before the layers."""
        tag = _tag_of(node)
        twin = None if tag is None else self._of_layer(layer.number, number).get(tag.name)
        if twin is None:
            return node
        name = tag_of(twin).name  # type: ignore[union-attr]  # alike layers have hollow parameters
        if name not in self._by_name:
            with self._graph.inserting_before(self._place):
                made = self._graph.placeholder(name.replace(".", "_"))
            made.meta = {**node.meta, "grapharg": _Twin(_Named(name), twin)}
            self._by_name[name] = made
        return self._by_name[name]

    def _of_layer(self, number: int, other: int) -> Mapping[str, nn.Parameter]:
        """Parameters of ``other`` by the names of those that they are like."""
        if (number, other) not in self._twins:
            first, second = (self._stand_ins.layers[one].named_parameters() for one in (number, other))
            pairs = zip(first, second, strict=True)
            self._twins[number, other] = {tag_of(one).name: twin for (_, one), (_, twin) in pairs}  # type: ignore[union-attr]
        return self._twins[number, other]


def _tag_of(node: Node) -> Any:
    return tag_of(getattr(node.meta.get("grapharg"), "example", None)) if node.op == "placeholder" else None


def _unlike(node: Node, found: str, expected: str) -> StandInError:
    return StandInError(
        f"node {node.name} {module_path(node)}".rstrip(),
        found=found,
        expected=expected,
        remedy="every layer is traced instead, which takes longer",
    )
