"""LoRA paths of a finished graph, parts of which the kernels beside their product do: that costs no launch.

    Before:  y = lora_linear(x, gate and up);  m = mul(silu(narrow(y, gate)), narrow(y, up));  z = lora_linear(m, down)
    After:   y, h = lora_linear_ahead(x, gate and up);  m, i = lora_swiglu(y, h, down);     z = lora_linear(m, down, i)
The activation adds B h of gate and up where that is faster, and makes A m of down.

    Before:  z = lora_linear(u, o);           s, x = all_reduce_add_norm(z, ...)
    After:   z = lora_linear_deferred(u, o);  s, x = all_reduce_add_norm_lora(z, ..., u, o)
The norm adds B (A u), before it sums over the ranks.

    Before:  z = lora_linear(m, down, i);           b = layer_boundary(z);  s, x = all_reduce_add_norm(b, ...)
    After:   z = lora_linear_deferred(m, down, i);  b, c = layer_boundary(z), layer_boundary(i)
             s, x = all_reduce_add_norm_expand(b, ..., c, down of the layer before)
The norm behind down lies in the next layer.

    Before:  y = lora_linear(x, q, k and v);           q = rotate_and_cache(y, ...)
    After:   y, h = lora_linear_ahead(x, q, k and v);  q = rotate_and_cache_lora(y, ..., h)
The rotation of q and k adds B h of all three, where that is faster.

In S-LoRA a collective lies between a path's factors, and what reads its product adds B h in the same ways. For graphs
of GPUs. With many tokens each path does what it did before.
"""

from collections.abc import Mapping, Sequence

from torch.fx import Graph, Node

from bdlora_compile.fused_activations import Activation, activation_behind, fuse_activation
from bdlora_compile.fused_norm_paths import fuse_norm, fuse_norms_of_next_layers, norm_behind
from bdlora_compile.ir import Captured
from bdlora_compile.lora_nodes import RotateArguments, RotateLoraArguments
from bdlora_compile.lora_paths import Path, paths_of, products_apart
from bdlora_compile.propagation import Known, propagate
from bdlora_compile.report import PassStats, Refusal

_NOTHING = "the kernel ahead and the one behind have no part of it"
_FASTER_INSIDE = "LoRA is taken to be faster inside of its product"
_APART = "its product, which has a bias, and LoRA are two operators"
_CHOSEN = "its tokens are chosen in the graph"


def fuse_paths(captured: Captured) -> PassStats:
    """Rewrite all paths of a graph for which it can be done; the others say why not.

    Returns:
        Paths of which something was done, reasons for what was not, and as a note how many paths there are.
    """
    graph = captured.graph
    paths, apart = paths_of(graph), products_apart(graph)
    reasons = {path.label: _NOTHING if _sees_all_tokens(path) else _CHOSEN for path in paths}
    reasons |= dict.fromkeys(apart, _APART)
    done: set[str] = set()
    known: Known = {}
    for step in (_into_activations, _into_norms_and_rotations, fuse_norms_of_next_layers) if paths else ():
        found = step(captured, [*filter(_sees_all_tokens, paths_of(graph))])
        reasons |= found
        if fused := {label for label, reason in found.items() if not reason}:
            done |= fused
            propagate(graph, "paths", known)
    graph.lint()
    refusals = [Refusal(label, reason) for label, reason in reasons.items() if reason]
    return PassStats(len(done), refusals, {"paths": len(reasons)})


def _sees_all_tokens(path: Path) -> bool:
    return path.token_slot.op == "placeholder"


def _into_activations(captured: Captured, paths: Sequence[Path]) -> Mapping[str, str]:
    """What became of paths that an activation has to do with, by label; empty where it does part of their LoRA."""
    found: dict[str, str] = {}
    for path in paths:
        label, activation = path.label, activation_behind(path)
        if isinstance(activation, Activation):
            fuse_activation(captured.graph, path, activation)
            found[label] = ""
            if activation.down is not None:
                found[activation.down.label] = ""
        elif activation:
            found[label] = activation
    return found


def _into_norms_and_rotations(captured: Captured, paths: Sequence[Path]) -> Mapping[str, str]:
    """The same for norms and rotations of a path's own layer."""
    found: dict[str, str] = {}
    for path in paths:
        label, norm, rotation = path.label, norm_behind(path), _rotation_behind(path)
        if norm is not None:
            fuse_norm(captured.graph, path, norm)
            found[label] = ""
        elif rotation is not None and path.pays_to_leave:
            _fuse_rotation(captured.graph, path, rotation)
            found[label] = ""
        elif rotation is not None:
            found[label] = _FASTER_INSIDE
    return found


def _rotation_behind(path: Path) -> Node | None:
    """The one reader of a path's product, if it rotates q and k of it."""
    readers = path.readers
    return readers[0] if [*map(RotateArguments.is_of, readers)] == [True] and path.num_sites == 3 else None


def _fuse_rotation(graph: Graph, path: Path, rotation: Node) -> None:
    left, known = path.leave(graph), RotateArguments.of(rotation)
    with graph.inserting_before(rotation):
        fused = RotateLoraArguments.taken_from(known, left).insert(graph)
    fused.meta = dict(rotation.meta)
    rotation.replace_all_uses_with(fused)
    graph.erase_node(rotation)
