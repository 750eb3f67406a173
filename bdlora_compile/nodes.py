"""Nodes as the inspector shows them: a stable key, a kind, where they come from; layers that are alike once."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from bdlora_compile.ir import (
    ArgumentWeight,
    Captured,
    MergedSource,
    Origin,
    Source,
    WeightSource,
    fake_value,
    layer_of,
    module_path,
    operator_name,
    record,
)
from bdlora_compile.layers import trailing_writes
from bdlora_compile.node_kinds import Kind, kernel_of, kind_of
from bdlora_compile.node_names import argument_path, name_nodes, weight_path
from bdlora_compile.printer import source_text, type_text


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node.

    Attributes:
        key: stable name, see `node_names.py`.
        kind: what it is to a reader.
        operator: as `ir.operator_name`.
        type: ``bf16[s23, 1, 64]``.
        placement: where the value lies on the ranks, ``S0/4``.
        origin: what it computes for.
        site: the LoRA site or sites that it belongs to.
        source: of a placeholder, where its value comes from; a slice of which tensor.
        operands: keys of the nodes that it reads.
        arguments: its other arguments, as text.
        layer: path of its layer, None outside layers.
        file: source file and line of the model's code, ``transformers/models/llama/modeling_llama.py:66``.
        code: that line.
        stage: the pass that made it, empty for captured ones.
        kernel: what runs it.
    """

    key: str
    kind: Kind
    operator: str
    type: str
    placement: str
    origin: Origin
    site: str | None
    source: str | None
    operands: Sequence[str]
    arguments: str
    layer: str | None
    file: str
    code: str
    stage: str
    kernel: str


@dataclass(frozen=True, slots=True)
class AlikeLayers:
    """Layers that are alike: nodes are shown for the first of them."""

    shown: str
    layers: Sequence[str]


@dataclass(frozen=True, slots=True)
class GraphView:
    """The nodes of a graph in its order, those of layers that are alike once."""

    nodes: Sequence[NodeView]
    layers: Sequence[AlikeLayers]


def view_graph(captured: Captured) -> GraphView:
    """The nodes of a graph as a reader sees them; nodes that have no key yet get one."""
    keys = name_nodes(captured.graph)
    by_layer = _nodes_by_layer(captured.graph)
    alike = _known_layers(captured) if captured.layers is not None else _group_layers(by_layer, keys)
    layers = {node: layer for layer, nodes in by_layer.items() for node in nodes}
    shown = {None, *(one.shown for one in alike)}
    nodes = [node for node in captured.graph.nodes if layers.get(node) in shown]
    return GraphView([_view(node, keys, layers.get(node)) for node in nodes], alike)


def _nodes_by_layer(graph: Graph) -> dict[str, list[Node]]:
    layers = {node: layer for node in graph.nodes if (layer := _layer_of_node(node)) is not None}
    # In the order in which they run: weights may come in another.
    calls = dict.fromkeys(layer for node, layer in layers.items() if node.op != "placeholder")
    by_layer: dict[str, list[Node]] = {layer: [] for layer in (*calls, *layers.values())}
    for node, layer in layers.items():
        by_layer[layer].append(node)
    # What the cache does after its last layer makes that layer no other kind.
    for layer in [*calls][-1:]:
        writes = trailing_writes(by_layer[layer])
        by_layer[layer] = [node for node in by_layer[layer] if node not in writes]
    return by_layer


def _layer_of_node(node: Node) -> str | None:
    if node.op != "placeholder":
        return layer_of(module_path(node))
    source = record(node).source
    if isinstance(source, (WeightSource, ArgumentWeight)):
        return layer_of(source.parameter)
    if isinstance(source, MergedSource):
        return layer_of(source.parts[0][0])
    # What a call brings (a cache) has layers of its own; only parameters lie in layers of the model.
    path = weight_path(node) if source is None and isinstance(_example(node), torch.nn.Parameter) else None
    return layer_of(path) if path else None


def _example(node: Node) -> object:
    return getattr(node.meta.get("grapharg"), "example", None)


def _known_layers(captured: Captured) -> list[AlikeLayers]:
    layers = captured.layers
    assert layers is not None, "asked above"
    paths = [(layers.path(kept), layers.path(number)) for number, kept in enumerate(layers.stands_in)]
    return [AlikeLayers(shown, [path for kept, path in paths if kept == shown]) for shown in dict.fromkeys(dict(paths))]


def _group_layers(by_layer: Mapping[str, Sequence[Node]], keys: Mapping[Node, str]) -> list[AlikeLayers]:
    groups: dict[object, list[str]] = {}
    for layer, nodes in by_layer.items():
        groups.setdefault(tuple(_signature(node, layer, keys) for node in nodes), []).append(layer)
    return [AlikeLayers(layers[0], layers) for layers in groups.values()]


def _signature(node: Node, layer: str, keys: Mapping[Node, str]) -> object:
    """What a node of a layer is, without the layer's number."""

    def inside(text: str) -> str:
        return text.replace(f"{layer}.", "*.").replace(f"{layer}/", "*/")

    operands = [inside(keys[one]) if inside(keys[one]) != keys[one] else "" for one in node.all_input_nodes]
    info = record(node)
    number = layer.rpartition(".")[2]
    literals = [text for text in _literals(node) if text != number or operator_name(node) != _CACHE_UPDATE]
    site = inside(info.site) if info.site else None
    return (
        inside(keys[node]),
        type_text(fake_value(node)),
        str(info.placement),
        info.origin,
        site,
        *operands,
        *literals,
    )


_CACHE_UPDATE = "bdlora::cache_update"
"""The operator that names its layer by number."""


def _literals(node: Node) -> list[str]:
    if node.op in ("placeholder", "output"):
        return []
    named = [f"{key}={_plain(value)}" for key, value in node.kwargs.items() if not isinstance(value, Node)]
    return [_plain(value) for value in node.args if not isinstance(value, Node)] + named


def _plain(value: Any) -> str:
    """An argument that is no node, with a dot for each node in it."""
    if isinstance(value, Node):
        return "·"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_plain, value))})"
    if isinstance(value, slice):
        return ":".join("" if part is None else _plain(part) for part in (value.start, value.stop))
    return str(value)


def _view(node: Node, keys: Mapping[Node, str], layer: str | None) -> NodeView:
    info, kind = record(node), kind_of(node)
    file, code = source_line(node.meta.get("stack_trace") or "")
    return NodeView(
        keys[node],
        kind,
        operator_name(node),
        type_text(fake_value(node)) if node.op != "output" else "",
        str(info.placement),
        info.origin,
        info.site,
        _text_of_source(info.source, node) if node.op == "placeholder" else None,
        [keys[operand] for operand in node.all_input_nodes],
        ", ".join(_literals(node)),
        layer,
        file if node.op not in ("placeholder", "output") else "",
        code if node.op not in ("placeholder", "output") else "",
        info.stage,
        kernel_of(node, kind),
    )


def _text_of_source(source: Source | None, node: Node) -> str:
    return argument_path(node) if source is None else source_text(source, node)


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)')
_TORCH = "torch/"


def source_line(stack_trace: str) -> tuple[str, str]:
    """(``file:line``, code) of the innermost frame of the model's own code; no folder of this machine is named."""
    frames = [(short_file(file), line, code) for file, line, code in _FRAME.findall(stack_trace)]
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    if not own:
        return "", ""
    file, line, code = own[-1]
    return f"{file}:{line}", code.strip()


def short_file(file: str) -> str:
    """Behind ``site-packages``, or below the working folder, or the name and its folder's."""
    _, found, inner = file.rpartition("site-packages/")
    if found:
        return inner
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "/".join(path.parts[-2:])
