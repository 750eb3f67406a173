"""Which arguments of a call a graph writes to, and which others stay where they are from call to call."""

from collections.abc import Iterator

import torch
from torch.fx import Node

from bdlora_compile.ir import (
    CacheSource,
    Captured,
    InputSource,
    fake_value,
    operator_name,
    placeholders,
    record,
)


def argument_indices(captured: Captured) -> frozenset[int]:
    """Positions of the arguments of a call that the graph reads or writes."""
    sources = (record(node).source for node in placeholders(captured.graph))
    return frozenset(source.index for source in sources if isinstance(source, (InputSource, CacheSource)))


def mutated_arguments(captured: Captured) -> frozenset[int]:
    """Positions of those that it writes to: caches, and tensors whose memory an operator in place is given."""
    written = {_memory(operand) for node in captured.graph.nodes for operand in written_operands(node)}
    found = set()
    for node in placeholders(captured.graph):
        match record(node).source:
            case CacheSource(index) | InputSource(index, True):
                found.add(index)
            case InputSource(index) if isinstance(fake_value(node), torch.Tensor) and _memory(node) in written:
                found.add(index)
    return frozenset(found)


def buffer_arguments(captured: Captured) -> frozenset[int]:
    """Positions of those that are buffers of the model, as Dynamo marks them: like weights they stay where they are."""
    return frozenset(
        source.index
        for node in placeholders(captured.graph)
        if isinstance(source := record(node).source, InputSource)
        and "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
    )


def written_operands(node: Node) -> Iterator[Node]:
    """Operands that a node writes to, by the operator's schema, or by its name where it has none (``add_``)."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        is_written = [bool(argument.is_write) for argument in schema.arguments]
        operands = [operand for operand, written in zip(node.args, is_written, strict=False) if written]
    elif node.op.startswith("call") and _is_in_place(operator_name(node)):
        operands = [node.args[0]]
    else:
        operands = []
    yield from (operand for operand in operands if isinstance(operand, Node))


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _memory(node: Node) -> int:
    """A number that tensors have in common if they share memory: fakes of views share a storage."""
    value = fake_value(node)
    return int(value.untyped_storage()._cdata) if isinstance(value, torch.Tensor) else id(node)
