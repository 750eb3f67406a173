"""LoRA of a product whose sum over the ranks is normed: the norm's kernel adds it before it sums.

In the same layer (o) the norm makes B (A u) itself, or adds B h where h is there. Behind down it lies in the next
layer: h goes over the boundary, at all boundaries or at none, since alike layers are one region, and the norm reads the
rows of the adapter tables of the layer before. Before the first they say that no slot has an adapter.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from bdlora_compile.ir import (
    BankField,
    BankSource,
    Captured,
    Layers,
    Origin,
    fake_tensor,
    insert_placeholder,
    operator_name,
    record,
    set_record,
)
from bdlora_compile.lora_paths import Layout, Left, LocalPath, Path
from bdlora_compile.regions import is_boundary, layer_boundary
from bdlora_compile.runtime.norm_op import all_reduce_add_norm_expand, all_reduce_add_norm_lora

_NORM = "bdlora::all_reduce_add_norm"


def norm_behind(path: Path) -> Node | None:
    """The norm that may add a path's LoRA: the path is of one site, and nobody else reads its product."""
    readers = path.readers
    is_normed = [*map(operator_name, readers)] == [_NORM] and _x_of(readers[0]) is path.y
    return readers[0] if is_normed and path.num_sites == 1 else None


def fuse_norm(graph: Graph, path: Path, norm: Node) -> None:
    """Leave a path's LoRA to the norm behind it."""
    if isinstance(path, LocalPath) and path.arguments.h_planes is None:
        _make_and_add(graph, path, norm)
        return
    left = path.leave(graph)
    _add(graph, norm, left, left.h, left.slots, left.scales)


def _make_and_add(graph: Graph, path: LocalPath, norm: Node) -> None:
    known = path.arguments
    lora = (known.x, known.pool, known.slots, known.scales, known.token_slot, known.sites, known.width)
    path.defer(graph)
    _replace(graph, norm, all_reduce_add_norm_lora._opoverload, lora)


def _add(graph: Graph, norm: Node, left: Left, h: Node, slots: Node, scales: Node) -> None:
    lora = (h, left.pool, slots, scales, left.token_slot, left.sites, left.out_features, left.parts)
    _replace(graph, norm, all_reduce_add_norm_expand._opoverload, lora)


def _replace(graph: Graph, norm: Node, target: torch._ops.OpOverload, lora: Sequence[Argument]) -> None:
    """The same norm with LoRA."""
    with graph.inserting_before(norm):
        fused = graph.call_function(target, (*norm.args, *lora))
    fused.meta = dict(norm.meta)
    norm.replace_all_uses_with(fused)
    graph.erase_node(norm)


def fuse_norms_of_next_layers(captured: Captured, paths: Iterable[Path]) -> Mapping[str, str]:
    """Leave LoRA behind which a layer ends to the next layer's norm.

    Returns:
        For each path at the end of a layer why it stays; empty if it does not.
    """
    norms = [node for node in captured.graph.nodes if operator_name(node) == _NORM and is_boundary(_x_of(node))]
    ending = {path.y: path for path in paths if path.num_sites == 1 and [*map(is_boundary, path.readers)] == [True]}
    found = [ending.get(_x_of(norm).all_input_nodes[0]) for norm in norms[1:]]
    known = [path for path in found if path is not None]
    reason = _reason(captured.layers, found)
    if captured.layers is not None and known and not reason:
        _hand_on(captured.graph, captured.layers, norms, known)
    return {path.label: reason for path in known}


def _x_of(norm: Node) -> Node:
    x = norm.args[0]
    assert isinstance(x, Node), "a norm is of a tensor"
    return x


def _reason(layers: Layers | None, paths: Sequence[Path | None]) -> str:
    """Why the paths at the ends of all layers do not go over the boundaries."""
    if layers is None or len(paths) != len(layers.kept):
        return "not every layer ends in a sum that the next one norms"
    if None in paths:
        return "another layer does not end in a product that can leave its LoRA"
    layouts = [path.layout for path in paths if path is not None]
    are_alike = all(layout == layouts[0] for layout in layouts)
    return "" if are_alike else "layers end in products of other shapes, or rows of the tables"


def _hand_on(graph: Graph, layers: Layers, norms: Sequence[Node], paths: Sequence[Path]) -> None:
    """Each norm reads the tables of the layer before; the last one, behind all layers, those of the last."""
    layout, lefts = paths[0].layout, [path.leave(graph) for path in paths]
    handed = [_insert_nothing(graph, norms[0], layout), *(left.h for left in lefts)]
    sources = [(layers.path(kept), True) for kept in layers.kept] + [(layers.path(len(layers.stands_in) - 1), False)]
    for norm, h, source in zip(norms, handed, sources, strict=True):
        slots = _insert_table(graph, BankSource(BankField.SLOTS, *source), lefts[0].slots)
        scales = _insert_table(graph, BankSource(BankField.SCALES, *source), lefts[0].scales)
        _add(graph, norm, lefts[0], _over_the_boundary(graph, norm, h), slots, scales)


def _insert_table(graph: Graph, source: BankSource, like: Node) -> Node:
    assert source.layer is not None, "of a layer"
    name = f"bank_{source.field.value}_{'before' if source.is_before else 'of'}_{source.layer.replace('.', '_')}"
    return insert_placeholder(graph, name, fake_tensor(like), source=source, stage="emit")


def _insert_nothing(graph: Graph, norm: Node, layout: Layout) -> Node:
    """The h that is handed to the first layer."""
    boundary = _x_of(norm)
    with graph.inserting_before(boundary):
        arguments = (boundary.args[0], layout.planes, layout.parts, layout.width)
        made = graph.call_function(torch.ops.bdlora.lora_nothing.default, arguments)
    set_record(made, origin=Origin.LORA, stage="emit")
    return made


def _over_the_boundary(graph: Graph, norm: Node, h: Node) -> Node:
    """Beside those boundaries that the norm reads."""
    before = _x_of(norm)
    with graph.inserting_before(before):
        carried = graph.call_function(layer_boundary, (h,))
    set_record(carried, origin=Origin.LORA, stage=record(before).stage)
    return carried
