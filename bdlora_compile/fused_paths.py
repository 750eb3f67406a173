"""LoRA paths of a finished graph, parts of which the kernels beside their product do: that costs no launch.

    Before:  y = lora_linear(x, gate and up);  m = mul(silu(narrow(y, gate)), narrow(y, up));  z = lora_linear(m, down)
    After:   m, h = lora_linear_swiglu(x, gate and up, down);                               z = lora_linear(m, down, h)
The activation makes A m of down, and adds B h of gate and up where that is faster.

    Before:  z = lora_linear(u, o);           s, x = all_reduce_add_norm(z, ...)
    After:   z = lora_linear_deferred(u, o);  s, x = all_reduce_add_norm_lora(z, ..., u, o)
The norm adds B (A u), before it sums over the ranks.

For graphs of GPUs, where a path and its product are one operator. With many tokens each does what it did before.
"""

import operator
from dataclasses import dataclass, replace

from torch.fx import Graph, Node

from bdlora_compile.ir import Captured, Origin, fake_tensor, operator_name, record, set_record
from bdlora_compile.lora_nodes import LinearArguments, LinearDeferredArguments, LinearSwigluArguments, is_lora_linear
from bdlora_compile.pass_manager import erase_with_operands
from bdlora_compile.report import PassStats, Refusal
from bdlora_compile.runtime import swiglu_op  # noqa: F401 - registers its operator
from bdlora_compile.runtime.norm_op import all_reduce_add_norm_lora

_NORM = "bdlora::all_reduce_add_norm"


def fuse_paths(captured: Captured) -> PassStats:
    """Rewrite all paths of a graph for which it can be done; the others say why not."""
    graph = captured.graph
    paths = [node for node in graph.nodes if is_lora_linear(node)]
    sites = {path: record(path).site or path.name for path in paths}
    left = {path: "the kernel ahead and the one behind have no part of it" for path in paths}
    for path in paths:
        arguments = LinearArguments.of(path)
        activation, norm = _activation(arguments.x), _norm_behind(path)
        if arguments.token_slot.op != "placeholder":
            left[path] = "its tokens are chosen in the graph"
        elif isinstance(activation, _Activation):
            _fuse_with_activation(graph, path, arguments, activation)
            del left[path], left[activation.gate_and_up]
        elif norm is not None:
            _fuse_with_norm(graph, path, arguments, norm)
            del left[path]
        elif activation:
            left[path] = activation
    graph.lint()
    refusals = [Refusal(sites[path], reason) for path, reason in left.items()]
    return PassStats(matches=len(paths) - len(refusals), refusals=refusals)


def _norm_behind(path: Node) -> Node | None:
    """The norm that may add the LoRA of a path: of one site, whose product nobody else reads."""
    readers, sites = list(path.users), LinearArguments.of(path).sites
    return readers[0] if [*map(operator_name, readers)] == [_NORM] and len(sites) == 1 else None


def _fuse_with_norm(graph: Graph, path: Node, known: LinearArguments, norm: Node) -> None:
    lora = (known.x, known.pool, known.slots, known.scales, known.token_slot, known.sites, known.width)
    with graph.inserting_before(norm):
        deferred = LinearDeferredArguments.taken_from(known).insert(graph)
        arguments = (deferred, *norm.args[1:], *lora)
        fused = graph.call_function(all_reduce_add_norm_lora._opoverload, arguments)
    deferred.meta, fused.meta = dict(path.meta), dict(norm.meta)
    norm.replace_all_uses_with(fused)
    for node in (norm, path):
        graph.erase_node(node)


@dataclass(frozen=True, slots=True)
class _Activation:
    """``product`` = silu(gate) * up, the halves of one path's result."""

    product: Node
    gate_and_up: Node


def _activation(product: Node) -> _Activation | str:
    """The activation that makes a path's x, or why it is none; empty if it is nothing like one."""
    if operator_name(product) != "mul" or len(product.all_input_nodes) != 2:
        return ""
    silu = next((node for node in product.all_input_nodes if operator_name(node) == "silu"), None)
    if silu is None:
        return ""
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
    h.meta["nn_module_stack"] = path.meta.get("nn_module_stack")
    set_record(h, origin=Origin.LORA, site=record(path).site, stage="emit")
    # Read again: its input is m now.
    replace(LinearArguments.of(path), h_planes=h).write_to(path)
