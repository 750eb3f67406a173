"""Nodes as the inspector shows them: a stable key, a kind, where they come from; layers that are alike once.

A key is ``<module path>/<operator>``, with ``#2``, ``#3`` behind it for the second and third of them. A node gets it
when it is first seen and keeps it through all passes, so two stages are compared by what a node *is*, not
by the name that FX gave it in one of them.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from torch.fx import Graph, Node

from bdlora_compile.collectives import WAIT, is_collective
from bdlora_compile.ir import (
    ArgumentWeight,
    Captured,
    InputSource,
    MergedSource,
    Origin,
    Source,
    WeightSource,
    fake_value,
    layer_of,
    module_path,
    node_key,
    operator_name,
    plain_path,
    record,
    set_node_key,
)
from bdlora_compile.layers import trailing_writes
from bdlora_compile.printer import source_text, type_text

Kind = Literal["collective", "lora-a", "lora-b", "lora", "product", "attention", "move", "input", "output", "other"]
"""What a node is to a reader: LoRA's first factor, its second, both in one operator; a product of the base; ..."""

_LORA_OPERATORS: Mapping[str, Kind] = {
    "bdlora::lora_shrink": "lora-a",
    "bdlora::lora_lookup": "lora-a",
    "bdlora::lora_expand": "lora-b",
    "bdlora::lora_apply_": "lora",
}
_PRODUCTS = frozenset({"linear", "mm", "matmul", "addmm", "bmm", "baddbmm", "embedding"})
_MOVES = frozenset(
    [
        "view",
        "reshape",
        "transpose",
        "permute",
        "t",
        "unsqueeze",
        "squeeze",
        "expand",
        "getitem",
        "narrow",
        "slice",
        "select",
        "cat",
        "chunk",
        "split",
        "stack",
        "clone",
        "contiguous",
        "view_as",
        "flatten",
        "unflatten",
        "_unsafe_view",
        "alias",
        "layer_boundary",
        "to",
        "_to_copy",
        "copy_",
        "write_rows",
    ]
) | {WAIT, "bdlora::cache_update", "bdlora::cache_write_"}

_KERNELS: Mapping[str, str] = {
    "bdlora::lora_shrink": "Triton: runtime/kernels/shrink.py (bf16, f16 on CUDA), else torch: runtime/ops.py",
    "bdlora::lora_lookup": "torch: runtime/embedding_ops.py",
    "bdlora::lora_expand": "Triton: runtime/kernels/expand.py (bf16, f16 on CUDA), else torch: runtime/ops.py",
    "bdlora::lora_apply_": "Triton: runtime/kernels/apply.py, one launch for few tokens (bf16, f16 on CUDA), "
    "else torch: runtime/ops.py",
    "bdlora::lora_work": "torch: which rows each program of the LoRA kernels takes",
}


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node.

    Attributes:
        key: stable name, see the module.
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


def name_nodes(graph: Graph) -> dict[Node, str]:
    """The stable key of each node; those that have none get one, and keep it."""
    keys: dict[Node, str] = {}
    taken: set[str] = set()
    nameless: list[Node] = []
    for node in graph.nodes:
        key = node_key(node)
        # A node that was copied from another one brought its key with it.
        if not key or key in taken:
            nameless.append(node)
        else:
            keys[node] = key
            taken.add(key)
    counters: dict[str, Iterable[int]] = {}
    for node in nameless:
        base = _base_of_key(node)
        key = base
        numbers = counters.setdefault(base, count(2))
        while key in taken:
            key = f"{base}#{next(iter(numbers))}"
        taken.add(key)
        keys[node] = key
        set_node_key(node, key)
    return keys


def symbol_names(captured: Captured) -> dict[str, str]:
    """Names of symbolic sizes: ``batch`` and ``seq`` of the forward's tokens, ``s0``, ``s1`` in order for others.

    A process numbers its symbols as it likes: names in reports must not depend on it.
    """
    names: dict[str, str] = {}
    value = fake_value(captured.token_input) if captured.token_input is not None else None
    if isinstance(value, torch.Tensor):
        for size, name in zip(value.shape[:2], ("batch", "seq"), strict=False):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                names.setdefault(str(size.node.expr), name)
    for node in captured.graph.nodes:
        for symbol in re.findall(r"\b[su]\d+\b", type_text(fake_value(node))):
            names.setdefault(symbol, f"s{sum(name.startswith('s') and name != 'seq' for name in names.values())}")
    return names


def renamed(names: Mapping[str, str]) -> Callable[[str], str]:
    """A function that puts names in place of a process's own symbols in a text."""
    pattern = re.compile(r"\b[su]\d+\b")
    return lambda text: pattern.sub(lambda found: names.get(found[0], found[0]), text)


def _base_of_key(node: Node) -> str:
    if node.op == "placeholder":
        return f"in/{_argument_path(node)}"
    if node.op == "output":
        return "out"
    return f"{module_path(node)}/{operator_name(node)}"


def _argument_path(node: Node) -> str:
    """Path of the parameter that a placeholder stands for, or what else tells it from the others."""
    source = record(node).source
    match source:
        case WeightSource(parameter, _) | ArgumentWeight(_, parameter, _):
            return parameter
        case MergedSource(parts):
            return "+".join(name for name, _ in parts)
        case None:
            pass
        case InputSource(index):
            return f"argument {index}" if _weight_path(node) is None else str(_weight_path(node))
        case _:
            return source_text(source, node)
    return _weight_path(node) or ("size" if isinstance(fake_value(node), torch.SymInt) else str(node.target))


def _weight_path(node: Node) -> str | None:
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None or isinstance(fake_value(node), torch.SymInt):
        return None
    name = source.name if isinstance(source.name, str) else source.name()
    return plain_path(name) or None


def _layer_of_node(node: Node) -> str | None:
    if node.op != "placeholder":
        return layer_of(module_path(node))
    source = record(node).source
    if isinstance(source, (WeightSource, ArgumentWeight)):
        return layer_of(source.parameter)
    if isinstance(source, MergedSource):
        return layer_of(source.parts[0][0])
    # What a call brings (a cache) has layers of its own; only parameters lie in layers of the model.
    path = _weight_path(node) if source is None and isinstance(_example(node), torch.nn.Parameter) else None
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
    info, kind = record(node), _kind(node)
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
        _kernel(node, kind),
    )


def _text_of_source(source: Source | None, node: Node) -> str:
    return _argument_path(node) if source is None else source_text(source, node)


def _kind(node: Node) -> Kind:
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    if is_collective(node):
        return "collective"
    name = operator_name(node)
    if name in _LORA_OPERATORS:
        return _LORA_OPERATORS[name]
    if name in _PRODUCTS:
        return _factor_of(node) or "product"
    if "attention" in name:
        return "attention"
    return "move" if name in _MOVES else "other"


def _factor_of(node: Node) -> Kind | None:
    """Which LoRA factor a product of a model of others reads, told by the parameter's name: for display alone."""
    for operand in node.all_input_nodes:
        while operand.op != "placeholder" and operator_name(operand) in _MOVES and len(operand.all_input_nodes) == 1:
            (operand,) = operand.all_input_nodes
        source = record(operand).source if operand.op == "placeholder" else None
        if isinstance(source, ArgumentWeight):
            name = source.parameter.lower()
            if "lora_a" in name or "lora_b" in name:
                return "lora-a" if "lora_a" in name else "lora-b"
    return None


def _kernel(node: Node, kind: Kind) -> str:
    if kind in ("input", "output"):
        return ""
    if kind == "collective":
        return "process group (NCCL, gloo)"
    name = operator_name(node)
    if name in _KERNELS:
        return _KERNELS[name]
    if kind in ("product", "lora-a", "lora-b"):
        return "BLAS library, or a template that Inductor chooses"
    if kind == "attention":
        return "attention kernel: runtime/attention.py"
    return "none of its own: Inductor joins it with its neighbours"


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
