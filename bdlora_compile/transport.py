"""What a finished graph's collectives go through: the process group, or PyTorch's symmetric memory."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Graph, Node

from bdlora_compile.collectives import ALL_GATHER, ALL_REDUCE, WAIT, all_reduce
from bdlora_compile.fused_norms import fuse_norms
from bdlora_compile.ir import (
    Captured,
    MailboxSource,
    Origin,
    Source,
    SymmetricSource,
    fake_tensor,
    insert_placeholder,
    operator_name,
    record,
    stage_nodes,
)
from bdlora_compile.lora_nodes import ShrinkGroupedArguments
from bdlora_compile.machine import SymmetricLimits
from bdlora_compile.pass_manager import erase_with_operands
from bdlora_compile.placement import Mesh
from bdlora_compile.propagation import find_fake_mode
from bdlora_compile.report import PassStats
from bdlora_compile.runtime.all_reduce import AllReduce
from bdlora_compile.runtime.all_reduce import all_reduce as reduce_through_buffer
from bdlora_compile.runtime.norm_op import all_reduce_add_norm


def through_symmetric_memory(captured: Captured, transport: AllReduce, mesh: Mesh, rank: int) -> PassStats | None:
    """Send a finished graph's all-reduces through symmetric memory; nothing where the transport has none.

    Before:  r = wait_tensor(all_reduce(x, sum, group))
    After:   r = bdlora::all_reduce(x, symmetric memory, largest one-shot, largest two-shot, group)
    Where a residual addition and a norm follow they are one operator with it (`fused_norms.py`).

    Returns:
        Which sums have their norm with them, and why others do not; None where the transport has no kernel for it.
    """
    if transport.buffer is None or transport.limits is None:
        return None
    reduce_instead_of_gather(captured, mesh, rank)
    if not any(stage_nodes(captured.graph, ALL_REDUCE)):
        return None
    buffer = _insert_memory(captured.graph, "symmetric_memory", SymmetricSource(), transport.buffer)
    stats = None
    if transport.mailbox is not None:
        mailbox = _insert_memory(captured.graph, "mailbox", MailboxSource(), transport.mailbox)
        sizes = (transport.limits.one_shot, transport.limits.two_shot)

        def insert(x: Node, residual: Node, weight: Node, epsilon: float) -> Node:
            arguments = (x, residual, weight, buffer, mailbox, epsilon, *sizes, mesh.group)
            return captured.graph.call_function(all_reduce_add_norm._opoverload, arguments)

        stats = fuse_norms(captured.graph, insert)
    _reduce_through_buffer(captured.graph, buffer, transport.limits)
    return stats


def reduce_instead_of_gather(captured: Captured, mesh: Mesh, rank: int) -> None:
    """Make gathers of LoRA's h [T, r], which wait for latency alone, all-reduces of shares that do not overlap.

    Symmetric memory has no gather of its own, and a gather leaves a copy to do.

    Before:  r = cat(chunk(wait_tensor(all_gather_into_tensor(h, N, group)), N), dim=1)
    After:   r = wait_tensor(all_reduce(h with zeros where other ranks have theirs, sum, group))
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
    with graph.inserting_before(joined):
        shares = _with_zeros(graph, h, mesh.size, rank)
        reduced, waited = all_reduce(graph, shares, mesh)
    for node in (shares, reduced, waited):
        node.meta = dict(joined.meta)
    joined.replace_all_uses_with(waited)
    erase_with_operands(graph, joined)


def _with_zeros(graph: Graph, h: Node, parts: int, part: int) -> Node:
    """h where ``part`` of so many lies; the operator that makes it leaves the room itself, if nobody else reads it."""
    if ShrinkGroupedArguments.is_of(h) and len(h.users) == 1:
        return replace(ShrinkGroupedArguments.of(h), parts=parts, part=part).insert(graph)
    width = int(fake_tensor(h).shape[1])
    return graph.call_function(torch.nn.functional.pad, (h, (part * width, (parts - 1 - part) * width)))


def _insert_memory(graph: Graph, name: str, source: Source, memory: Tensor) -> Node:
    """A placeholder for memory of this rank."""
    with find_fake_mode(graph):
        value = torch.empty(memory.shape, dtype=memory.dtype, device=memory.device)
    return insert_placeholder(graph, name, value, source=source, stage="emit")


def _reduce_through_buffer(graph: Graph, buffer: Node, limits: SymmetricLimits) -> None:
    for node in [*stage_nodes(graph, ALL_REDUCE)]:
        x, _, group = node.args
        with graph.inserting_before(node):
            arguments = (x, buffer, limits.one_shot, limits.two_shot, group)
            reduced = graph.call_function(reduce_through_buffer._opoverload, arguments)
        reduced.meta = dict(node.meta)
        for wait in list(node.users):
            wait.replace_all_uses_with(reduced)
            graph.erase_node(wait)
        graph.erase_node(node)
