"""Parts of a graph that are compiled by themselves: what comes before the layers, each kind of layer, what follows.

A decoder's layers are alike. The deduplicate pass keeps one of each kind in the graph, between boundaries; after all
passes `split` cuts the graph there. A layer's region is compiled once and run for every layer that it stands for, each
time with that layer's weights, rows of the adapter tables and part of the cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from bdlora_compile.errors import PassError
from bdlora_compile.ir import (
    BankSource,
    CacheSource,
    Captured,
    CarriedSource,
    Layers,
    MergedSource,
    SharedSource,
    Source,
    WeightSource,
    is_symbol,
    placeholders,
    record,
    set_record,
)
from bdlora_compile.placement import Placement


def layer_boundary(x: Tensor) -> Tensor:
    """A value that one layer hands to the next; `split` cuts here, and the node goes away with it.

    Boundaries side by side are one cut, over which several values go.
    """
    return x


def is_boundary(node: Node) -> bool:
    """Whether the node is a boundary between regions."""
    return node.op == "call_function" and node.target is layer_boundary


@dataclass(frozen=True, slots=True)
class Step:
    """One run of a region.

    Attributes:
        region: index into `Regions.modules`.
        kept: number of the layer that the region was made of, None outside the layers.
        layer: number of the layer that it is run for.
    """

    region: int
    kept: int | None = None
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class Regions:
    """A graph in parts, and the order in which they run.

    The first of several returns (*carried, *shared); each layer takes what is carried and returns as many values; the
    last returns what the graph returns. A graph without layers is one region.

    Attributes:
        modules: the parts; their placeholders have records, as those of any graph here.
        steps: the runs, in order.
        layers: the model's layers, None where the graph is one region.
    """

    modules: Sequence[GraphModule]
    steps: Sequence[Step]
    layers: Layers | None = None

    def sources(self, step: Step) -> list[Source | None]:
        """Where the values of a step's placeholders come from."""
        found = [record(node).source for node in placeholders(self.modules[step.region].graph)]
        if self.layers is None or step.kept is None or step.layer is None:
            return found
        return [_for_layer(source, self.layers, step.kept, step.layer) for source in found]

    def label(self, step: Step) -> str:
        """What profilers call a step: the path of its layer."""
        if self.layers is None or step.layer is None:
            return "before layers" if step.region == 0 else "after layers"
        return self.layers.path(step.layer)

    def placements(self, step: Step) -> list[Placement]:
        """Where those values lie on the ranks; the same in all layers that a region stands for."""
        return [record(node).placement for node in placeholders(self.modules[step.region].graph)]


def split(captured: Captured) -> Regions:
    """Cut a graph at its boundaries.

    Raises:
        PassError: a value crosses a boundary other than by being carried or by coming from before the layers.
    """
    parts, cuts = _cut(captured.graph)
    if captured.layers is None or not cuts:
        return Regions([_region(captured, parts[0], {}, None)], [Step(0)])
    parts = _with_own_values(parts, captured.layers)
    shared = _shared_values(parts)
    carried = [tuple(map(_operand, cut)) for cut in cuts]
    crossing = {node: SharedSource(index) for index, node in enumerate(shared, start=len(carried[0]))}
    taken = [{boundary: CarriedSource(index) for index, boundary in enumerate(cut)} for cut in cuts]
    modules = [_region(captured, parts[0], {}, (*carried[0], *shared))]
    for part, before, results in zip(parts[1:-1], taken, carried[1:], strict=False):
        modules.append(_region(captured, part, {**crossing, **before}, results))
    modules.append(_region(captured, parts[-1], {**crossing, **taken[-1]}, None))
    numbers = {kept: index for index, kept in enumerate(captured.layers.kept, start=1)}
    runs = [Step(numbers[kept], kept, layer) for layer, kept in enumerate(captured.layers.stands_in)]
    return Regions(modules, [Step(0), *runs, Step(len(modules) - 1)], captured.layers)


def _cut(graph: Graph) -> tuple[list[list[Node]], list[list[Node]]]:
    """(the calls before, between and after the cuts, the boundaries of each cut)."""
    parts: list[list[Node]] = [[]]
    cuts: list[list[Node]] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if not is_boundary(node):
            parts[-1].append(node)
        elif cuts and not parts[-1]:
            cuts[-1].append(node)
        else:
            cuts.append([node])
            parts.append([])
    return parts, cuts


def _operand(boundary: Node) -> Node:
    operand = boundary.args[0]
    assert isinstance(operand, Node), f"{boundary.name}: a boundary carries a value of the graph"
    return operand


def _with_own_values(parts: Sequence[Sequence[Node]], layers: Layers) -> list[list[Node]]:
    """The parts, with what is computed before the layers from values of one layer moved to where it is read.

    A pass puts what it makes of a placeholder (a slice of a norm's weight) right after the placeholders.
    """
    own: set[Node] = set()
    for node in parts[0]:
        if any(operand in own or _is_of_layer(operand, layers) for operand in node.all_input_nodes):
            own.add(node)
    first = [node for node in parts[0] if node not in own]
    return [first, *([*_needed(part, own, parts[0]), *part] for part in parts[1:])]


def _is_of_layer(node: Node, layers: Layers) -> bool:
    """Whether the node is a placeholder whose value is another one in each layer."""
    source = record(node).source if node.op == "placeholder" else None
    return any(_for_layer(source, layers, kept, -1) != source for kept in layers.kept)


def _needed(part: Sequence[Node], own: set[Node], order: Sequence[Node]) -> list[Node]:
    """Those of ``own`` that a part reads, or that these read."""
    found: set[Node] = set()
    pending = [operand for node in part for operand in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node in own and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return [node for node in order if node in found]


def _shared_values(parts: Sequence[Sequence[Node]]) -> list[Node]:
    """What is computed before the layers and read by or after them, in graph order."""
    after = {node for part in parts[1:] for node in part}
    return [node for node in parts[0] if any(user in after for user in node.users)]


def _region(
    captured: Captured, nodes: Sequence[Node], crossing: Mapping[Node, Source], outputs: tuple[Node, ...] | None
) -> GraphModule:
    """A module of its own for ``nodes``; ``outputs`` None keeps the graph's own output."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    own = {*nodes}
    used = dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes if operand not in own)
    used |= dict.fromkeys(output for output in outputs or () if output not in own)
    # Sizes are symbols: a region that is compiled by itself takes them all, read or not.
    symbols = [node for node in placeholders(captured.graph) if is_symbol(node)]
    for node in dict.fromkeys([*symbols, *used]):
        copies[node] = _copy_input(graph, node, crossing)
    for node in nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    if outputs is not None:
        graph.output(tuple(copies[node] for node in outputs))
    else:
        graph.output(map_arg(nodes[-1].args[0], copies.__getitem__))
    graph.lint()
    return GraphModule(captured.module, graph)


def _copy_input(graph: Graph, node: Node, crossing: Mapping[Node, Source]) -> Node:
    if node.op == "placeholder":
        return graph.node_copy(node)
    if node not in crossing:
        raise PassError(
            f"node {node.name}",
            found="a layer's value read in another layer",
            expected="that layers see of one another only what is carried over a boundary",
            remedy="report this with the graph: a pass moved a value over a boundary",
        )
    copied = graph.placeholder(node.name)
    copied.meta = dict(node.meta)
    set_record(copied, source=crossing[node])
    return copied


def _for_layer(source: Source | None, layers: Layers, kept: int, layer: int) -> Source | None:
    """The source of the same value in another layer."""

    def renamed(name: str) -> str:
        prefix = f"{layers.path(kept)}."
        return f"{layers.path(layer)}.{name.removeprefix(prefix)}" if name.startswith(prefix) else name

    match source:
        case WeightSource(parameter):
            return replace(source, parameter=renamed(parameter))
        case MergedSource(parts):
            return MergedSource(tuple((renamed(name), placement) for name, placement in parts))
        case CacheSource():
            return replace(source, layer=layer)
        case BankSource(_, path) if path is not None:
            return replace(source, layer=layers.path(layer))
        case _:
            return source
