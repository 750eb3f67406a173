"""LoRA paths of a finished graph, parts of which the kernels before and behind their product do: that costs no launch.

A x is made by the kernel that writes x, and B h is added by the one that reads y, where there are such kernels.

    Before:  y = lora_linear(x, gate and up);  m = mul(silu(narrow(y, gate)), narrow(y, up));  z = lora_linear(m, down)
    After:   m, h = lora_linear_swiglu(x, gate and up, down);                               z = lora_linear(m, down, h)
    Before:  z = lora_linear(u, o);  s, x = all_reduce_add_norm(z, ...);  y = lora_linear(x, gate and up)
    After:   z = lora_linear_deferred(u, o);  s, x, h = all_reduce_add_norm_lora(z, ..., gate and up, u, o)
             y = lora_linear(x, gate and up, h)

For graphs of GPUs, where a path and its product are one operator. With many tokens each does what it did before.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Graph, Node

from bdlora_compile.ir import Captured, Origin, fake_tensor, operator_name, record, set_record, stage_nodes
from bdlora_compile.lora_nodes import LinearArguments, LinearDeferredArguments, LinearSwigluArguments, is_lora_linear
from bdlora_compile.pass_manager import erase_with_operands
from bdlora_compile.report import PassStats, Refusal
from bdlora_compile.runtime import swiglu_op  # noqa: F401 - registers its operator
from bdlora_compile.runtime.kernels.tiles import h_width
from bdlora_compile.runtime.norm_op import all_reduce_add_norm_lora

_NORM = "bdlora::all_reduce_add_norm"


def fuse_paths(captured: Captured) -> PassStats:
    """Rewrite all paths of a graph for which it can be done; the others say why not."""
    graph = captured.graph
    paths = [node for node in graph.nodes if is_lora_linear(node)]
    sites = {path: record(path).site or path.name for path in paths}
    reasons = {path: _reason(path) for path in paths}
    done = {path for norm in [*stage_nodes(graph, _NORM)] for path in _fuse_with_norm(graph, norm, reasons)}
    for path in paths:
        if path in done or reasons[path]:
            continue
        arguments = LinearArguments.of(path)
        activation = _activation(arguments.x)
        if isinstance(activation, str):
            reasons[path] = activation
        else:
            _fuse_with_activation(graph, path, arguments, activation)
    graph.lint()
    refusals = [Refusal(sites[path], reason) for path, reason in reasons.items() if reason and path not in done]
    return PassStats(matches=len(paths) - len(refusals), refusals=refusals)


def _reason(path: Node) -> str:
    """Why nothing else can do a part of a path, whatever is beside it; empty if something may."""
    return "" if LinearArguments.of(path).token_slot.op == "placeholder" else "its tokens are chosen in the graph"


def _fuse_with_norm(graph: Graph, norm: Node, reasons: Mapping[Node, str]) -> list[Node]:
    """Let a norm do the LoRA of the path ahead of it, and make the h of that behind; which paths those are."""
    before = norm.args[0]
    assert isinstance(before, Node), "a sum over the ranks is of a node"
    ahead = before if reasons.get(before) == "" and _is_alone(before) else None
    normed = [node for node in norm.users if operator_name(node) == "getitem" and node.args[1] == 1]
    readers = [path for result in normed for path in result.users if reasons.get(path) == ""]
    behind = readers[0] if readers else None
    if ahead is None and behind is None:
        return []
    with graph.inserting_before(norm):
        _, *rest = norm.args
        fused = graph.call_function(
            all_reduce_add_norm_lora._opoverload,
            (before if ahead is None else _defer(graph, ahead), *rest, *_lora_of_norm(ahead, behind)),
        )
        h = graph.call_function(operator.getitem, (fused, 2)) if behind is not None else None
    fused.meta = dict(norm.meta)
    norm.replace_all_uses_with(fused)
    graph.erase_node(norm)
    if ahead is not None:
        graph.erase_node(ahead)
    if behind is not None and h is not None:
        _give(behind, h)
    return [path for path in (ahead, behind) if path is not None]


def _is_alone(path: Node) -> bool:
    """Whether a norm may add the LoRA of a path: of one site, whose product nobody else reads."""
    arguments = LinearArguments.of(path)
    return len(path.users) == 1 and len(arguments.sites) == 1 and arguments.h_planes is None


def _defer(graph: Graph, path: Node) -> Node:
    """The product of a path, whose LoRA is added later."""
    deferred = LinearDeferredArguments.taken_from(LinearArguments.of(path)).insert(graph)
    deferred.meta = dict(path.meta)
    return deferred


def _lora_of_norm(ahead: Node | None, behind: Node | None) -> tuple[Any, ...]:
    """The operator's arguments on LoRA, in its order."""
    known = LinearArguments.of(next(path for path in (behind, ahead) if path is not None))
    bank = (known.pool, known.slots, known.scales, known.token_slot)
    reader = ([], 2) if behind is None else (known.sites, h_width(known.width))
    if ahead is None:
        return (*bank, *reader, None, 0, 0)
    first = LinearArguments.of(ahead)
    return (*bank, *reader, first.x, first.sites[0], first.width)


@dataclass(frozen=True, slots=True)
class _Activation:
    """``product`` = silu(gate) * up, the halves of one path's result."""

    product: Node
    gate_and_up: Node


def _activation(product: Node) -> _Activation | str:
    """The activation that makes a path's x, or what makes it instead."""
    if operator_name(product) != "mul" or len(product.all_input_nodes) != 2:
        return f"there is no kernel with its h for what makes its input: {operator_name(product)}"
    silu = next((node for node in product.all_input_nodes if operator_name(node) == "silu"), None)
    if silu is None:
        return "its input is a product without silu"
    (up,) = (node for node in product.all_input_nodes if node is not silu)
    (gate,) = silu.all_input_nodes
    if any(len(node.users) != 1 for node in (product, silu, gate, up)):
        return "what lies between gate, up and it is read elsewhere too"
    whole, other = _half(gate, 0), _half(up, 1)
    if whole is None or whole is not other or not is_lora_linear(whole) or len(whole.users) != 2:
        return "gate and up are no halves of one product with LoRA"
    return _Activation(product, whole)


def _half(part: Node, index: int) -> Node | None:
    """The node of which ``part`` is the first or the second half of the last dim."""
    if operator_name(part) != "narrow" or part.kwargs:
        return None
    whole, dim, start, length = part.args
    assert isinstance(whole, Node), "narrow takes a tensor"
    is_half = dim == -1 and start == index * length and fake_tensor(whole).shape[-1] == 2 * length  # type: ignore[operator]
    return whole if is_half else None


def _fuse_with_activation(graph: Graph, path: Node, arguments: LinearArguments, activation: _Activation) -> None:
    before, (down,) = LinearArguments.of(activation.gate_and_up), arguments.sites
    with graph.inserting_before(activation.gate_and_up):
        inserted = LinearSwigluArguments.taken_from(before, down=down, down_width=arguments.width).insert(graph)
        m, h = (graph.call_function(operator.getitem, (inserted, index)) for index in (0, 1))
    inserted.meta = {"nn_module_stack": activation.gate_and_up.meta.get("nn_module_stack")}
    own = record(activation.gate_and_up)
    set_record(inserted, placement=own.placement, site=own.site, stage="emit")
    m.meta = dict(activation.product.meta)
    set_record(m, stage="emit")
    activation.product.replace_all_uses_with(m)
    erase_with_operands(graph, activation.product)
    _give(path, h)


def _give(path: Node, h: Node) -> None:
    """Let a path read its h."""
    h.meta["nn_module_stack"] = path.meta.get("nn_module_stack")
    set_record(h, origin=Origin.LORA, site=record(path).site, stage="emit")
    replace(LinearArguments.of(path), h_planes=h).write_to(path)
