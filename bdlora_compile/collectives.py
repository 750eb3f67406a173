"""Functional collectives as graph nodes: how they are recognised and how they are inserted."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.fx import Graph, Node

from bdlora_compile.ir import Captured, operator_name
from bdlora_compile.placement import Mesh, Shard

_NAMES = frozenset(
    f"_c10d_functional::{name}"
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
)
ALL_REDUCE = "_c10d_functional::all_reduce"
ALL_GATHER = "_c10d_functional::all_gather_into_tensor"
WAIT = "_c10d_functional::wait_tensor"


def is_collective(node: Node) -> bool:
    """Whether the node starts a collective (waiting for one is not one)."""
    return node.op == "call_function" and operator_name(node) in _NAMES


def group_named(name: str) -> ProcessGroup:
    """The process group of a collective's last argument."""
    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]  # not exported
    group: ProcessGroup = resolve(name)
    return group


def all_reduce(graph: Graph, value: Node, mesh: Mesh) -> Sequence[Node]:
    """Nodes that sum ``value`` over the mesh; the last one is the result."""
    reduced = graph.call_function(torch.ops._c10d_functional.all_reduce.default, (value, "sum", mesh.group))
    return reduced, graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (reduced,))


def all_gather(graph: Graph, value: Node, shard: Shard, mesh: Mesh) -> Sequence[Node]:
    """Nodes that put the pieces of ``value`` side by side on the shard's dim; the last one is the result.

    The collective stacks ranks on dim 0; where pieces are held more than once, one copy of each is kept.
    """
    gather = torch.ops._c10d_functional.all_gather_into_tensor.default
    stacked = graph.call_function(gather, (value, mesh.size, mesh.group))
    waited = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (stacked,))
    if shard.dim == 0 and shard.pieces == mesh.size:
        return stacked, waited
    chunks = graph.call_function(torch.chunk, (waited, mesh.size), {"dim": 0})
    copies = mesh.size // shard.pieces
    kept = [graph.call_function(operator.getitem, (chunks, piece * copies)) for piece in range(shard.pieces)]
    joined = graph.call_function(torch.cat, (kept,), {"dim": shard.dim})
    return stacked, waited, chunks, *kept, joined


def in_order(nodes: Sequence[Node]) -> list[Node]:
    """Nodes that were made under one `inserting_after` lie in reverse: put them in the order they were made."""
    first, *rest = nodes
    previous = first
    for node in rest:
        previous.append(node)
        previous = node
    return list(nodes)


def ordered_list(captured: Captured) -> str:
    """The graph's collectives in order, a line each: operator, dtype, shape. Ranks compare this text.

    Where a layer stands for others a line says which.
    """
    layers = [] if captured.layers is None else [f"layers {captured.layers.stands_in}"]
    lines = [
        f"{operator_name(node).split('::')[-1]} {_operand_text(node)}"
        for node in captured.graph.nodes
        if is_collective(node)
    ]
    return "\n".join([*layers, *lines])


def _operand_text(node: Node) -> str:
    operand = node.args[0]
    assert isinstance(operand, Node), f"{node.name}: the operand of a collective is a node"
    value = operand.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return "unknown"
    # A symbol's name is this process's own affair: only its place is compared.
    sizes = ["?" if isinstance(size, torch.SymInt) else str(size) for size in value.shape]
    return f"{value.dtype} [{', '.join(sizes)}]"
