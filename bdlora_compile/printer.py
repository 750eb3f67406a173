"""One text form of a graph, used by dumps, goldens, diffs and errors alike."""

from collections.abc import Iterable

import torch
from torch.fx import Graph, Node

from bdlora_compile.ir import (
    ArgumentWeight,
    BankSource,
    CacheSource,
    InputSource,
    MailboxSource,
    MergedSource,
    Origin,
    RankIndices,
    RebuiltSource,
    Source,
    SymmetricSource,
    WeightSource,
    fake_value,
    operator_name,
    record,
)

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
}


def print_graph(graph: Graph) -> str:
    """A line a node: number, operator, arguments, dtype[shape], placement, what it belongs to."""
    numbers = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    return "\n".join(_line(node, numbers) for node in graph.nodes) + "\n"


def _line(node: Node, numbers: dict[Node, str]) -> str:
    if node.op == "output":
        return f"return {_plain(node.args[0], numbers)}"
    head = f"{numbers[node]} = {_call(node, numbers)}"
    return "  ".join(part for part in (head, *_facts_of(node)) if part)


def _call(node: Node, numbers: dict[Node, str]) -> str:
    if node.op == "placeholder":
        return source_text(record(node).source, node)
    arguments = [_plain(argument, numbers) for argument in node.args]
    arguments += [f"{key}={_plain(value, numbers)}" for key, value in node.kwargs.items()]
    return f"{operator_name(node)}({', '.join(arguments)})"


def _facts_of(node: Node) -> Iterable[str]:
    info = record(node)
    yield type_text(fake_value(node))
    yield str(info.placement)
    yield "" if info.origin is Origin.BASE else f"!{info.origin.value}"
    yield f"@{info.site}" if info.site else ""


def dtype_text(dtype: torch.dtype) -> str:
    """``f32`` of torch.float32."""
    return _DTYPES.get(dtype, str(dtype))


def type_text(value: object) -> str:
    """``f32[2, s0, 64]`` of a tensor, the types of a tuple's members, the text of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{dtype_text(value.dtype)}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_text(member) for member in value)})"
    if value is None:
        return ""
    is_number = isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))
    return str(value) if is_number else type(value).__name__


def source_text(source: Source | None, node: Node) -> str:
    """Where a placeholder's value comes from."""
    match source:
        case InputSource(index, rank_local):
            return f"input {index}" + (" rank-local" if rank_local else "")
        case CacheSource(index, layer, part):
            return f"cache {('keys', 'values')[part]} of layer {layer} in input {index}"
        case WeightSource(parameter, _):
            return f"weight {parameter}"
        case MergedSource(parts):
            return f"weights {' + '.join(name for name, _ in parts)}"
        case BankSource(field, layer):
            return f"bank {field.value}" + (f" of {layer}" if layer else "")
        case ArgumentWeight(index, parameter, declared):
            return f"weight {parameter} in input {index}" + (f", {declared}" if declared else "")
        case RebuiltSource(parameter, index):
            return f"own columns of {parameter} in input {index}, rebuilt"
        case SymmetricSource():
            return "symmetric memory"
        case MailboxSource():
            return "mailbox"
        case RankIndices(length, pieces):
            return f"own indices {length} of {pieces}"
        case _:
            return f"placeholder {node.name}"


def _plain(argument: object, numbers: dict[Node, str]) -> str:
    match argument:
        case Node():
            return numbers[argument]
        case tuple() | list():
            return f"({', '.join(_plain(member, numbers) for member in argument)})"
        case slice():
            return ":".join("" if part is None else _plain(part, numbers) for part in (argument.start, argument.stop))
        case _:
            return str(argument)
