"""LoRA paths of a finished graph, put beside their base products: for few tokens they cost what does not fit there.

    Before:  y = lora_linear(x, W, adapters);                 z = reader(y)
    After:   y, delta = lora_linear_beside(x, W, adapters);   z = reader(y, delta)
The product and scale * (B (A x)) are made at the same time, on two streams. The kernel that reads the product adds
delta: the rotation of q, k and v; the activation of gate and up; the norm behind the sum over the ranks of o, and of
down, whose norm lies in the next layer.

In S-LoRA a collective lies between a path's factors, and beside the product, too:
    Before:  y = linear(x, W);  h = lora_shrink_grouped(x, ...);  r = all_reduce(h, ...);  lora_expand_(y, r, ...)
    After:   y, delta = lora_linear_bridged(x, W, adapters, ...)

For graphs of GPUs. With many tokens the product has its LoRA, and nobody reads delta.
"""

from collections.abc import Mapping, Sequence

from torch.fx import Graph, Node

from bdlora_compile.fused_activations import activation_behind, fuse_activation
from bdlora_compile.fused_norm_paths import fuse_norms_of_next_layers, norm_behind
from bdlora_compile.ir import Captured
from bdlora_compile.lora_nodes import RotateArguments
from bdlora_compile.lora_paths import Path, paths_of
from bdlora_compile.propagation import Known, propagate
from bdlora_compile.report import PassStats, Refusal

_NOBODY = "the kernel behind does not add what lies beside its product"
_CHOSEN = "its tokens are chosen in the graph"


def fuse_paths(captured: Captured) -> PassStats:
    """Rewrite all paths of a graph for which it can be done; the others say why not.

    Returns:
        Paths that lie beside their product, reasons for others, and as a note how many paths there are.
    """
    graph = captured.graph
    paths, reasons = paths_of(graph)
    reasons |= {path.label: _NOBODY if _sees_all_tokens(path) else _CHOSEN for path in paths}
    known: Known = {}
    for step in (_into_layers, fuse_norms_of_next_layers) if paths else ():
        found = step(captured, [*filter(_sees_all_tokens, paths_of(graph)[0])])
        reasons |= found
        if not all(found.values()):
            propagate(graph, "paths", known)
    graph.lint()
    refusals = [Refusal(label, reason) for label, reason in reasons.items() if reason]
    return PassStats(len(reasons) - len(refusals), refusals, {"paths": len(reasons)})


def _sees_all_tokens(path: Path) -> bool:
    return path.token_slot.op == "placeholder"


def _into_layers(captured: Captured, paths: Sequence[Path]) -> Mapping[str, str]:
    """What became of paths whose reader lies in the same layer, by label; empty where it adds their LoRA."""
    return {path.label: reason for path in paths if (reason := _fuse(captured.graph, path)) is not None}


def _fuse(graph: Graph, path: Path) -> str | None:
    """Why a path stays, empty if it does not, None where what reads it is not known."""
    activation = activation_behind(path)
    if isinstance(activation, Node):
        fuse_activation(graph, path, activation)
        return ""
    reader = norm_behind(path) or _rotation_behind(path)
    if reader is None:
        return activation or None
    _, delta = path.put_beside(graph)
    reader.args = (*reader.args, delta)
    return ""


def _rotation_behind(path: Path) -> Node | None:
    """The one reader of a path's product, if it rotates q and k of it."""
    readers = path.readers
    return readers[0] if [*map(RotateArguments.is_of, readers)] == [True] and path.num_sites == 3 else None
