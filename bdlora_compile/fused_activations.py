"""silu(gate) * up behind a product of both with LoRA: one operator, which adds what lies beside the product.

Before:  m = mul(silu(narrow(y, gate)), narrow(y, up))
After:   m = swiglu(y, delta)
"""

from torch.fx import Graph, Node

from bdlora_compile.ir import fake_tensor, operator_name, record, set_record
from bdlora_compile.lora_paths import Path
from bdlora_compile.pass_manager import erase_with_operands
from bdlora_compile.runtime.swiglu_op import swiglu


def activation_behind(path: Path) -> Node | str:
    """silu(gate) * up of the halves of a path's result, or why it is not that; empty if it is nothing like it."""
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
    return product


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


def fuse_activation(graph: Graph, path: Path, product: Node) -> None:
    """Put a path beside its product, and let the activation behind, ``product``, add it."""
    y, delta = path.put_beside(graph)
    with graph.inserting_before(product):
        m = graph.call_function(swiglu._opoverload, (y, delta))
    m.meta = dict(product.meta)
    set_record(m, placement=record(product).placement, stage="emit")
    product.replace_all_uses_with(m)
    erase_with_operands(graph, product)
