"""LoRA beside a product whose sum over the ranks is normed: the norm's kernel adds it before it sums.

Behind down the norm lies in the next layer: what down lacks goes over the boundary, at all boundaries or at none, since
alike layers are one region. Before the first layer it is zeros.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch.fx import Graph, Node

from bdlora_compile.ir import Captured, Layers, Origin, fake_tensor, operator_name, record, set_record
from bdlora_compile.lora_paths import Path
from bdlora_compile.regions import is_boundary, layer_boundary
from bdlora_compile.runtime.linear_op import lora_no_delta

_NORM = "bdlora::all_reduce_add_norm"


def norm_behind(path: Path) -> Node | None:
    """The norm that may add a path's LoRA: the path is of one site, and nobody else reads its product."""
    readers = path.readers
    is_normed = [*map(_is_open_norm, readers)] == [True] and _x_of(readers[0]) is path.y
    return readers[0] if is_normed and path.num_sites == 1 else None


def fuse_norms_of_next_layers(captured: Captured, paths: Iterable[Path]) -> Mapping[str, str]:
    """Put paths with which a layer ends beside their products, and let the next layer's norm add them.

    Returns:
        For each path at the end of a layer why it stays; empty if it does not.
    """
    norms = [node for node in captured.graph.nodes if _is_open_norm(node) and is_boundary(_x_of(node))]
    ending = {path.y: path for path in paths if path.num_sites == 1 and [*map(is_boundary, path.readers)] == [True]}
    found = [ending.get(_x_of(norm).all_input_nodes[0]) for norm in norms[1:]]
    known = [path for path in found if path is not None]
    reason = _reason(captured.layers, found)
    if known and not reason:
        _hand_on(captured.graph, norms, known)
    return {path.label: reason for path in known}


def _is_open_norm(node: Node) -> bool:
    """Whether it is a norm behind a sum to which nothing is added yet."""
    return operator_name(node) == _NORM and len(node.args) == len(node.target._schema.arguments) - 1  # type: ignore[union-attr]


def _x_of(norm: Node) -> Node:
    x = norm.args[0]
    assert isinstance(x, Node), "a norm is of a tensor"
    return x


def _reason(layers: Layers | None, paths: Sequence[Path | None]) -> str:
    """Why the paths at the ends of all layers do not go over the boundaries."""
    if layers is None or len(paths) != len(layers.kept):
        return "not every layer ends in a sum that the next one norms"
    if None in paths:
        return "another layer does not end in a product that can have its LoRA beside it"
    # Layers hand on one tensor of one size.
    sizes = {int(fake_tensor(path.y).shape[-1]) for path in paths if path is not None}
    return "" if len(sizes) == 1 else "layers end in products of other shapes"


def _hand_on(graph: Graph, norms: Sequence[Node], paths: Sequence[Path]) -> None:
    deltas = [_insert_nothing(graph, norms[0]), *(path.put_beside(graph)[1] for path in paths)]
    for norm, delta in zip(norms, deltas, strict=True):
        norm.args = (*norm.args, _over_the_boundary(graph, norm, delta))


def _insert_nothing(graph: Graph, norm: Node) -> Node:
    """What is handed to the first layer."""
    boundary = _x_of(norm)
    with graph.inserting_before(boundary):
        made = graph.call_function(lora_no_delta._opoverload, (boundary.args[0],))
    set_record(made, origin=Origin.LORA, stage="emit")
    return made


def _over_the_boundary(graph: Graph, norm: Node, delta: Node) -> Node:
    """Beside those boundaries that the norm reads."""
    before = _x_of(norm)
    with graph.inserting_before(before):
        carried = graph.call_function(layer_boundary, (delta,))
    set_record(carried, origin=Origin.LORA, stage=record(before).stage)
    return carried
