"""silu(gate) * up behind a product of both with LoRA: one operator, which does LoRA on both sides of it.

Before:  m = mul(silu(narrow(y, gate)), narrow(y, up));  z = lora_linear(m, down)
After:   m, h = lora_swiglu(y, ..., down);               z = lora_linear(m, down, h)
"""

import operator
from dataclasses import dataclass, replace

from torch.fx import Graph, Node

from bdlora_compile.ir import Origin, fake_tensor, operator_name, record, set_record
from bdlora_compile.lora_nodes import LinearArguments, SwigluArguments, is_lora_linear
from bdlora_compile.lora_paths import LocalPath, Path, local_path
from bdlora_compile.pass_manager import erase_with_operands
from bdlora_compile.runtime import swiglu_op  # noqa: F401 - registers its operator


@dataclass(frozen=True, slots=True)
class Activation:
    """``product`` = silu(gate) * up, the halves of a path's result; ``down`` reads it, if that is a local path too."""

    product: Node
    down: LocalPath | None


def activation_behind(path: Path) -> Activation | str:
    """What reads a path's result, or why that is no activation; empty if it is nothing like one."""
    if path.num_sites != 2 or len(path.readers) != 2:
        return ""
    gate, up = sorted(path.readers, key=_start)
    if not _is_half(gate, 0) or not _is_half(up, 1):
        return ""
    if len(gate.users) != 1 or len(up.users) != 1:
        return "its halves are read elsewhere too"
    (silu,), (product,) = gate.users, up.users
    is_activation = operator_name(silu) == "silu" and {*silu.users} == {product} and operator_name(product) == "mul"
    if not is_activation or {*product.args} != {silu, up} or product.kwargs:
        return "its halves are no gate and up of an activation"
    return Activation(product, _down_of(product, path.token_slot))


def _start(part: Node) -> int:
    return part.args[2] if operator_name(part) == "narrow" and isinstance(part.args[2], int) else -1


def _is_half(part: Node, index: int) -> bool:
    """Whether ``part`` is the first or the second half of the last dim of what it is a part of."""
    if operator_name(part) != "narrow" or part.kwargs:
        return False
    whole, dim, start, length = part.args
    assert isinstance(whole, Node), "narrow takes a tensor"
    assert isinstance(length, int), "products are cut at numbers"
    return (dim, start) == (-1, index * length) and int(fake_tensor(whole).shape[-1]) == 2 * length


def _down_of(product: Node, token_slot: Node) -> LocalPath | None:
    """The one reader of an activation, if it is a product with LoRA of one site and of the same tokens."""
    (reader, *others) = product.users
    if others or not is_lora_linear(reader):
        return None
    known = LinearArguments.of(reader)
    fits = known.x is product and len(known.sites) == 1 and known.token_slot is token_slot
    return local_path(reader) if fits else None


def fuse_activation(graph: Graph, path: Path, activation: Activation) -> None:
    """Rewrite it, and the product behind if that has its h from the activation."""
    product, down = activation.product, activation.down
    inserted = _insert(graph, path, activation)
    with graph.inserting_before(product):
        m, h = (graph.call_function(operator.getitem, (inserted, index)) for index in (0, 1))
    m.meta = dict(product.meta)
    set_record(m, stage="emit")
    product.replace_all_uses_with(m)
    erase_with_operands(graph, product)
    if down is None:
        graph.erase_node(h)
        return
    h.meta["nn_module_stack"] = down.y.meta.get("nn_module_stack")
    set_record(h, origin=Origin.LORA, site=down.label, stage="emit")
    # Read again: its input is m now.
    replace(down.arguments, h_planes=h).write_to(down.y)


def _insert(graph: Graph, path: Path, activation: Activation) -> Node:
    product, down = activation.product, activation.down
    behind: dict[str, object] = {"down": (), "down_width": 1}
    if down is not None:
        behind = {"down": tuple(down.arguments.sites), "down_width": down.arguments.width}
    left = path.leave(graph) if path.pays_to_leave else None
    before = left or LinearArguments.of(path.y)
    y, h, parts = (path.y, None, 1) if left is None else (left.y, left.h, left.parts)
    with graph.inserting_before(product):
        inserted = SwigluArguments.taken_from(before, y=y, h=h, parts=parts, **behind).insert(graph)
    inserted.meta = {"nn_module_stack": product.meta.get("nn_module_stack")}
    set_record(inserted, placement=record(product).placement, site=record(y).site, stage="emit")
    return inserted
