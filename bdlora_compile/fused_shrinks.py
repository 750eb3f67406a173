"""LoRA paths of a finished graph whose h = A x is made by the kernel that writes x: a launch less, x is read once less.

    Before:  y = lora_linear(x, gate and up);  m = mul(silu(narrow(y, gate)), narrow(y, up));  z = lora_linear(m, down)
    After:   m, h = lora_linear_swiglu(x, gate and up, down);                               z = lora_linear(m, down, h)
    Before:  s, x = all_reduce_add_norm(...);                             y = lora_linear(x, ...)
    After:   s, x, h = all_reduce_add_norm_shrink(..., sites of y);       y = lora_linear(x, ..., h)

For graphs of GPUs, where a path and its product are one operator. What attention writes has no such kernel.
"""

import operator
from dataclasses import dataclass, replace

from torch.fx import Graph, Node

from bdlora_compile.ir import Captured, Origin, fake_tensor, operator_name, record, set_record
from bdlora_compile.lora_nodes import LinearArguments, LinearSwigluArguments, is_lora_linear
from bdlora_compile.pass_manager import erase_with_operands
from bdlora_compile.report import PassStats, Refusal
from bdlora_compile.runtime import swiglu_op  # noqa: F401 - registers its operator
from bdlora_compile.runtime.kernels.tiles import h_width
from bdlora_compile.runtime.norm_op import all_reduce_add_norm_shrink

_NORM = "bdlora::all_reduce_add_norm"


def fuse_shrinks(captured: Captured) -> PassStats:
    """Rewrite all paths of a graph for which it can be done; the others say why not."""
    graph, refusals = captured.graph, []
    paths = [node for node in graph.nodes if is_lora_linear(node)]
    for path in paths:
        reason = _fuse(graph, path)
        if reason:
            refusals.append(Refusal(record(path).site or path.name, reason))
    graph.lint()
    return PassStats(matches=len(paths) - len(refusals), refusals=refusals)


def _fuse(graph: Graph, path: Node) -> str:
    """Make the h of a path where its x is made; or why not."""
    arguments = LinearArguments.of(path)
    if arguments.token_slot.op != "placeholder":
        return "its tokens are chosen in the graph"
    if operator_name(arguments.x) == "getitem" and operator_name(arguments.x.all_input_nodes[0]) == _NORM:
        _fuse_with_norm(graph, path, arguments)
        return ""
    activation = _activation(arguments.x)
    if isinstance(activation, str):
        return activation
    _fuse_with_activation(graph, path, arguments, activation)
    return ""


def _fuse_with_norm(graph: Graph, path: Node, arguments: LinearArguments) -> None:
    (norm,) = arguments.x.all_input_nodes
    bank = (arguments.pool, arguments.slots, arguments.token_slot, arguments.sites, h_width(arguments.width))
    with graph.inserting_before(norm):
        both = graph.call_function(all_reduce_add_norm_shrink._opoverload, (*norm.args, *bank))
        h = graph.call_function(operator.getitem, (both, 2))
    both.meta = dict(norm.meta)
    norm.replace_all_uses_with(both)
    graph.erase_node(norm)
    _give(path, h)


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
    gate = silu.args[0]
    between = (product, silu, gate, up)
    if not isinstance(gate, Node) or any(len(node.users) != 1 for node in between):
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
