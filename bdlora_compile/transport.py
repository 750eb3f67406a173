"""What a finished graph's collectives go through: the process group, or PyTorch's symmetric memory."""

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from bdlora_compile.collectives import ALL_GATHER, ALL_REDUCE, WAIT, all_reduce
from bdlora_compile.ir import (
    Captured,
    Origin,
    SymmetricSource,
    fake_tensor,
    operator_name,
    placeholders,
    record,
    set_record,
    stage_nodes,
)
from bdlora_compile.pass_manager import erase_with_operands
from bdlora_compile.placement import Mesh
from bdlora_compile.propagation import find_fake_mode
from bdlora_compile.runtime.all_reduce import AllReduce
from bdlora_compile.runtime.all_reduce import all_reduce as reduce_through_buffer


def through_symmetric_memory(captured: Captured, transport: AllReduce, mesh: Mesh, rank: int) -> None:
    """Send a finished graph's all-reduces through symmetric memory; nothing where the transport has none.

    Before:  r = wait_tensor(all_reduce(x, sum, group))
    After:   r = bdlora::all_reduce(x, symmetric memory, largest one-shot, largest two-shot, group)
    """
    if transport.buffer is None or transport.limits is None:
        return
    reduce_instead_of_gather(captured, mesh, rank)
    if any(stage_nodes(captured.graph, ALL_REDUCE)):
        _reduce_through_buffer(captured, transport)


def reduce_instead_of_gather(captured: Captured, mesh: Mesh, rank: int) -> None:
    """Make gathers of LoRA's h [T, r], which wait for latency alone, all-reduces of shares that do not overlap.

    Symmetric memory has no gather of its own, and a gather leaves a copy to do.

    Before:  r = cat(chunk(wait_tensor(all_gather_into_tensor(h, N, group)), N), dim=1)
    After:   r = wait_tensor(all_reduce(pad(h, zeros where other ranks have theirs), sum, group))
    """
    for node in [*stage_nodes(captured.graph, ALL_GATHER)]:
        joined = _joined_on_columns(node, mesh.size)
        if record(node).origin is Origin.LORA and joined is not None:
            _reduce_instead(captured.graph, node, joined, mesh, rank)


def _joined_on_columns(gather: Node, size: int) -> Node | None:
    """The node that puts all ranks' shares side by side on dim 1, if that is all that becomes of them."""
    node = gather
    for name in (WAIT, "chunk"):
        users = list(node.users)
        if len(users) != 1 or operator_name(users[0]) != name:
            return None
        node = users[0]
    joins = {user for piece in node.users for user in piece.users}
    joined = joins.pop() if len(joins) == 1 else None
    if joined is None or operator_name(joined) != "cat" or joined.kwargs != {"dim": 1}:
        return None
    pieces = joined.args[0]
    assert isinstance(pieces, Sequence), "cat takes a list"
    return joined if [piece.args[1] for piece in pieces if isinstance(piece, Node)] == list(range(size)) else None


def _reduce_instead(graph: Graph, gather: Node, joined: Node, mesh: Mesh, rank: int) -> None:
    h = gather.args[0]
    assert isinstance(h, Node), "the operand of a collective is a node"
    width = int(fake_tensor(h).shape[1])
    with graph.inserting_before(joined):
        padded = graph.call_function(torch.nn.functional.pad, (h, (rank * width, (mesh.size - 1 - rank) * width)))
        reduced, waited = all_reduce(graph, padded, mesh)
    for node in (padded, reduced, waited):
        node.meta = dict(joined.meta)
    joined.replace_all_uses_with(waited)
    erase_with_operands(graph, joined)


def _reduce_through_buffer(captured: Captured, transport: AllReduce) -> None:
    assert transport.buffer is not None, "asked before"
    assert transport.limits is not None, "asked before"
    graph, shape = captured.graph, transport.buffer.shape
    with graph.inserting_after(placeholders(graph)[-1]), find_fake_mode(graph):
        buffer = graph.placeholder("symmetric_memory")
        buffer.meta["example_value"] = torch.empty(shape, dtype=torch.uint8, device=transport.buffer.device)
    set_record(buffer, source=SymmetricSource(), stage="emit")
    for node in [*stage_nodes(graph, ALL_REDUCE)]:
        x, _, group = node.args
        with graph.inserting_before(node):
            arguments = (x, buffer, transport.limits.one_shot, transport.limits.two_shot, group)
            reduced = graph.call_function(reduce_through_buffer._opoverload, arguments)
        reduced.meta = dict(node.meta)
        for wait in list(node.users):
            wait.replace_all_uses_with(reduced)
            graph.erase_node(wait)
        graph.erase_node(node)
