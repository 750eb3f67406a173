"""Fake propagation: the value of every node recomputed from the placeholders', without touching data.

A decoder has many layers that are alike, so the same operator meets operands of the same metadata over and over.
Each distinct call is computed once and its result shared, between layers and between passes: most of a graph is as the
pass before left it. The cost grows with the distinct calls, not with layers times passes.
"""

from collections.abc import Hashable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_leaves

from bdlora_compile.errors import PassError
from bdlora_compile.ir import fake_value, operator_name

Known = dict[Hashable, object]
"""Results of the distinct calls that were computed so far, each with the fake mode that it belongs to."""


def propagate(graph: Graph, after: str, known: Known | None = None) -> None:
    """Compute every node's fake value from the placeholders': shapes of one rank once the graph is partitioned.

    Args:
        graph: whose nodes' ``example_value`` is written.
        after: the pass that changed it, for the error.
        known: results of earlier propagations; new ones join them.

    Raises:
        PassError: an operator rejects the shapes that it gets.
    """
    mode = find_fake_mode(graph)
    calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
    known = {} if known is None else known
    # A result that a later node reshapes in place cannot stand for several nodes.
    is_sharing = not any(_reshapes_in_place(node) for node in calls)
    # Composite operators are decomposed in Python: their C++ decompositions ask symbolic sizes for numbers.
    with mode, enable_python_dispatcher(), torch.no_grad():
        for node in calls:
            key = _call_key(node, mode) if is_sharing else None
            if key is not None and key in known:
                node.meta["example_value"] = known[key]
                continue
            result = _fake_result(node, after)
            node.meta["example_value"] = result
            if key is not None and not _is_data_dependent(result):
                known[key] = result


def find_fake_mode(graph: Graph) -> FakeTensorMode:
    """The fake mode that the graph's values belong to.

    Raises:
        PassError: no placeholder carries a fake tensor.
    """
    for node in graph.nodes:
        value = fake_value(node)
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise PassError(
        "graph",
        found="no placeholder with a fake tensor",
        expected="a graph that Dynamo captured",
        remedy="compile the model through `backend='bdlora'`",
    )


def _call_key(node: Node, mode: FakeTensorMode) -> Hashable | None:
    """What decides the node's value without its data; None if an operand cannot be compared."""
    leaves, structure = tree_flatten((_shaping_arguments(node), node.kwargs))
    keys = tuple(value_key(fake_value(leaf) if isinstance(leaf, Node) else leaf) for leaf in leaves)
    return None if None in keys else (mode, node.op, node.target, str(structure), keys)


def _shaping_arguments(node: Node) -> list[object]:
    """The arguments, with the number of sites for the sites: which factors are read differs in every layer."""
    names = (
        [argument.name for argument in schema.arguments] if (schema := getattr(node.target, "_schema", None)) else []
    )
    return [
        len(value) if name == "sites" and isinstance(value, Sequence) else value
        for value, name in zip_longest(node.args, names)
    ]


def value_key(value: object) -> Hashable | None:
    """What two values that no operator can tell apart in shape have in common; None if a value cannot be compared."""
    if isinstance(value, torch.Tensor):
        sizes = tuple(number_key(size) for size in (*value.shape, *value.stride(), value.storage_offset()))
        return ("tensor", value.dtype, value.device, value.ndim, value.requires_grad, sizes)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return ("symbol", number_key(value))
    if isinstance(value, (tuple, list)):
        inner = tuple(value_key(item) for item in value)
        return None if None in inner else (type(value), inner)
    if isinstance(value, slice):
        return value_key((value.start, value.stop, value.step))
    return (type(value), value) if isinstance(value, Hashable) else None


def number_key(number: Any) -> Hashable:
    """A number, or the expression of a symbolic one with what is known to be equal replaced."""
    return number if isinstance(number, (int, float, bool)) else (number.node.expr,)


def _is_data_dependent(result: object) -> bool:
    """Whether the result's size depends on data: each such call has sizes of its own."""
    return any(
        bool(free_unbacked_symbols(leaf))
        for leaf in tree_leaves(result)
        if isinstance(leaf, (torch.Tensor, torch.SymInt))
    )


def _reshapes_in_place(node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    packet = getattr(torch.ops.aten, name, None) if name.endswith("_") and not name.endswith("__") else None
    if packet is None:
        return False
    return any(torch.Tag.inplace_view in getattr(packet, overload).tags for overload in packet.overloads())


def _fake_result(node: Node, after: str) -> object:
    args: Any = map_arg(node.args, fake_value)  # type: ignore[arg-type]  # any value may stand for a node
    kwargs: Any = map_arg(node.kwargs, fake_value)  # type: ignore[arg-type]  # the same
    try:
        if node.op == "call_method":
            receiver, *rest = args
            return getattr(receiver, str(node.target))(*rest, **kwargs)
        assert callable(node.target), f"{node.name}: target of a call_function is callable"
        return node.target(*args, **kwargs)
    except Exception as error:
        shapes = ", ".join(f"{source.name} {_shape(source)}" for source in node.all_input_nodes)
        raise PassError(
            f"node {node.name} ({operator_name(node)}) after pass {after}",
            found=f"operands {shapes}: {error}",
            expected="shapes that the operator accepts",
            remedy="report this with the graph: the pass left shapes that do not fit",
        ) from error


def _shape(node: Node) -> str:
    value = fake_value(node)
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else str(value)
