"""The decoder layers of a captured graph: the calls of each, what it gets from the one before and what it hands on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from bdlora_compile.ir import WeightSource, is_tensor, layer_of, module_path, record


class UnlikeLayersError(Exception):
    """A graph whose layers are not a chain: ``where``, and the ``reason``."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a graph.

    Attributes:
        number: of the layer in the model's list.
        path: module path.
        nodes: its calls, in order.
        carried: the one value that it gets from the layer before (the first: from what comes before the layers).
        result: the one value that it hands on.
    """

    number: int
    path: str
    nodes: Sequence[Node]
    carried: Node
    result: Node


@dataclass(frozen=True, slots=True)
class LayerStack:
    """The layers of a graph.

    Attributes:
        prefix: module path of their list.
        layers: in order.
        tail: the calls after them.
    """

    prefix: str
    layers: Sequence[Layer]
    tail: Sequence[Node]


def find_layers(graph: Graph) -> LayerStack:
    """The graph's layers; weights must have their sources (the tag pass writes them).

    Raises:
        UnlikeLayersError: there are fewer than two, they do not run in order, or one reads more of another than its
            result.
    """
    calls, tail = _calls_by_layer(graph)
    paths = list(calls)
    prefixes = {path.rpartition(".")[0] for path in paths}
    if len(paths) < 2 or len(prefixes) > 1 or [_number(path) for path in paths] != list(range(len(paths))):
        text = ", ".join(paths[:4]) or "none"
        raise UnlikeLayersError(
            "layers of the graph", f"found {text}; two or more of one list, run once each in order, wanted"
        )
    writes = trailing_writes(calls[paths[-1]])
    calls[paths[-1]] = [node for node in calls[paths[-1]] if node not in writes]
    carried = _carried(calls)
    results = _results(calls)
    layers = [
        Layer(_number(path), path, calls[path], value, result)
        for path, value, result in zip(paths, carried, results, strict=True)
    ]
    return LayerStack(prefixes.pop(), layers, [*writes, *tail])


def is_weight_of(node: Node, path: str) -> bool:
    """Whether the node is the placeholder of a parameter of the module ``path``."""
    source = record(node).source if node.op == "placeholder" else None
    return isinstance(source, WeightSource) and source.parameter.startswith(f"{path}.")


def _number(path: str) -> int:
    return int(path.rpartition(".")[2])


def _calls_by_layer(graph: Graph) -> tuple[dict[str, list[Node]], list[Node]]:
    """Calls by the path of their layer in the order of the first, and the calls after the last of them."""
    calls: dict[str, list[Node]] = {}
    tail: list[Node] = []
    current = None
    for node in graph.nodes:
        path = layer_of(module_path(node))
        if node.op == "placeholder" or (path is None and current is None):
            continue
        if path is None:
            tail.append(node)
            continue
        # A call without a layer between two of a layer belongs to it.
        calls.setdefault(current or path, []).extend(tail)
        calls.setdefault(path, []).append(node)
        current, tail = path, []
    return calls, tail


def trailing_writes(nodes: Sequence[Node]) -> list[Node]:
    """Those of the last layer's calls that are no part of it: a cache that counts its tokens after its last layer.

    They write to values from before the layer, read nothing of it, and nothing reads what they wrote.
    """
    own = {*nodes}
    position = {node: index for index, node in enumerate(nodes)}

    def is_last_use(write: Node) -> bool:
        written = filter(is_tensor, write.all_input_nodes)
        return all(position.get(user, -1) <= position[write] for value in written for user in value.users)

    calls = [node for node in nodes if node.op != "placeholder" and not node.users]
    return [node for node in calls if own.isdisjoint(node.all_input_nodes) and is_last_use(node)]


def _carried(calls: Mapping[str, Sequence[Node]]) -> list[Node]:
    """The value that each layer gets from the one before."""
    owner = {node: path for path, nodes in calls.items() for node in nodes}
    carried = []
    for path, before in zip([*calls][1:], calls, strict=False):
        read = dict.fromkeys(operand for node in calls[path] for operand in node.all_input_nodes)
        others = [node for node in read if owner.get(node, path) != path]
        if len(others) != 1 or owner[others[0]] != before:
            names = ", ".join(node.name for node in others) or "nothing"
            raise UnlikeLayersError(path, f"it reads {names} of other layers; one value of the layer before wanted")
        carried.append(others[0])
    first, second = [*calls.values()][:2]
    return [_same_operand(first, second, carried[0]), *carried]


def _same_operand(first: Sequence[Node], second: Sequence[Node], carried: Node) -> Node:
    """What the first layer has where the second one first reads ``carried``."""
    position, reader = next((at, node) for at, node in enumerate(second) if carried in node.all_input_nodes)
    operands = first[position].all_input_nodes if position < len(first) else []
    place = reader.all_input_nodes.index(carried)
    if place >= len(operands) or operands[place] in first:
        raise UnlikeLayersError(layer_of(module_path(reader)) or "layers", "it does not begin as the layer before does")
    return operands[place]


def _results(calls: Mapping[str, Sequence[Node]]) -> list[Node]:
    """What each layer hands on to the next, and the last one to what follows."""
    following: list[set[Node] | None] = [*({*nodes} for nodes in [*calls.values()][1:]), None]
    results = []
    for (path, nodes), readers in zip(calls.items(), following, strict=True):
        own = {*nodes}
        outside = {node: [user for user in node.users if user not in own] for node in nodes}
        read = [node for node, users in outside.items() if users]
        elsewhere = [user.name for node in read for user in outside[node] if readers and user not in readers]
        if len(read) != 1 or elsewhere:
            names = ", ".join(node.name for node in read) or "nothing"
            also = f", also by {elsewhere[0]}" if elsewhere else ""
            raise UnlikeLayersError(path, f"{names} of it is read outside{also}; one value for the next layer wanted")
        results.append(read[0])
    return results
