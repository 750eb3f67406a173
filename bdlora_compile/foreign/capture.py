"""Capture a graph that others sharded, in the operators that torch itself runs (ATen), and describe its placeholders.

Dynamo's graph goes through AOTAutograd first: DTensors become local tensors and visible collectives, writes in place
become values, and every way to write a product becomes one of few operators.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.source import GetItemSource
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as ReplicatedByDTensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

from bdlora_compile.collectives import WAIT, group_named, is_collective
from bdlora_compile.declared import Declaration, declaration_of
from bdlora_compile.errors import ConfigError, PassError
from bdlora_compile.foreign.paths import GroupMember
from bdlora_compile.ir import (
    ArgumentWeight,
    Captured,
    InputSource,
    fake_value,
    operator_name,
    placeholders,
    plain_path,
    set_record,
)
from bdlora_compile.placement import Placement, RankLocal, Replicate

Runnable = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _Argument:
    """A tensor that Dynamo's graph takes.

    Attributes:
        tensor: what this rank holds of it: the local part of a DTensor.
        name: of a parameter in the user's model, None of what a call brings.
        declared: what its owner says of it.
        is_dtensor: whether it is a DTensor.
        is_replicated: whether a DTensor says that every rank holds the whole.
    """

    tensor: Tensor
    name: str | None
    declared: Declaration | None
    is_dtensor: bool
    is_replicated: bool


@dataclass(frozen=True, slots=True)
class ForeignGraph:
    """One rank's graph.

    Attributes:
        captured: the graph.
        groups: this rank in each process group that the graph names.
        tensors: this rank's parameters, by the index of their argument.
        has_dtensors: whether some parameter is a DTensor.
    """

    captured: Captured
    groups: Mapping[str, GroupMember]
    tensors: Mapping[int, Tensor]
    has_dtensors: bool


def is_foreign(module: GraphModule) -> bool:
    """Whether a graph of Dynamo's is part of a model that others sharded: collectives, DTensors or declared factors."""
    examples = (example_of(node) for node in placeholders(module.graph))
    if any(isinstance(example, DTensor) or declaration_of(example) is not None for example in examples):
        return True
    return any(is_collective(node) for node in module.graph.nodes)


def capture_through_aot(
    module: GraphModule, example_inputs: Sequence[Any], compile_graph: Callable[[ForeignGraph, Sequence[Any]], Runnable]
) -> Runnable:
    """Bring Dynamo's graph into ATen form, and return what Dynamo shall call.

    Args:
        compile_graph: makes a function of the graph's arguments of it and its fake arguments.

    Raises:
        ConfigError: gradients are wanted.
    """
    from torch._dynamo.backends.common import aot_autograd  # importing it takes seconds

    arguments = [found for node in placeholders(module.graph) if (found := _argument(node)) is not None]

    def compile_forward(graph_module: GraphModule, fakes: Sequence[Any]) -> Runnable:
        # AOTAutograd compiles under its fake mode; probing and rebuilding work on real tensors.
        with _disable_current_modes(), torch.no_grad():
            return compile_graph(foreign_graph(graph_module, arguments), fakes)

    backend = aot_autograd(
        fw_compiler=_refuse_gradients, inference_compiler=compile_forward, keep_inference_input_mutations=True
    )
    result: Runnable = backend(module, example_inputs)
    return result


def foreign_graph(module: GraphModule, arguments: Sequence[_Argument]) -> ForeignGraph:
    """A graph of our own with records on its placeholders."""
    captured = Captured(module, module.graph).copy()
    for node in captured.graph.nodes:
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]
    tensors: dict[int, Tensor] = {}
    nodes = placeholders(captured.graph)
    takers = [(index, node) for index, node in enumerate(nodes) if isinstance(fake_value(node), Tensor)]
    _require_same_arguments([node for _, node in takers], arguments)
    for node in captured.graph.nodes:
        set_record(node, placement=Replicate() if operator_name(node) == WAIT else RankLocal())
    for index, node in enumerate(nodes):
        set_record(node, source=InputSource(index))
    for (index, node), argument in zip(takers, arguments, strict=True):
        if argument.name is not None:
            placement: Placement = Replicate() if argument.is_replicated else RankLocal()
            set_record(node, source=ArgumentWeight(index, argument.name, argument.declared), placement=placement)
            tensors[index] = argument.tensor
    has_dtensors = any(argument.is_dtensor for argument in arguments)
    return ForeignGraph(captured, group_members(captured.graph), tensors, has_dtensors)


def group_members(graph: Graph) -> dict[str, GroupMember]:
    """This rank in each process group that a collective of the graph names."""
    names = dict.fromkeys(str(node.args[-1]) for node in graph.nodes if is_collective(node))
    groups = {name: group_named(name) for name in names}
    return {name: GroupMember(group.rank(), group.size()) for name, group in groups.items()}


def example_of(node: Node) -> object:
    """The object that Dynamo saw for a placeholder."""
    return node.meta["grapharg"].example if "grapharg" in node.meta else None


def _argument(node: Node) -> _Argument | None:
    example = example_of(node)
    if not isinstance(example, Tensor):
        return None
    declared = declaration_of(example)
    source = node.meta["grapharg"].source
    is_weight = isinstance(example, nn.Parameter) or declared is not None or not _is_input(source)
    name = plain_path(source.name if isinstance(source.name, str) else source.name()) or node.name
    if not isinstance(example, DTensor):
        return _Argument(example, name if is_weight else None, declared, is_dtensor=False, is_replicated=False)
    whole = all(isinstance(part, ReplicatedByDTensor) for part in example.placements)
    return _Argument(example._local_tensor, name if is_weight else None, declared, True, whole)


def _is_input(source: object) -> bool:
    """Whether a source of Dynamo's is an argument of the call, or one of ``*arguments``."""
    if isinstance(source, GetItemSource) and isinstance(source.index, int):
        source = source.base
    return bool(getattr(source, "is_input", False))


def _require_same_arguments(nodes: Sequence[Node], arguments: Sequence[_Argument]) -> None:
    expected = [tuple(argument.tensor.shape) for argument in arguments]
    found = [tuple(getattr(fake_value(node), "shape", ())) for node in nodes]
    is_same = len(found) == len(expected) and all(
        len(one) == len(other) and all(not isinstance(a, int) or a == b for a, b in zip(one, other, strict=True))
        for one, other in zip(found, expected, strict=True)
    )
    if not is_same:
        raise PassError(
            "arguments of the graph",
            found=f"{len(found)} tensors behind AOTAutograd",
            expected=f"the {len(expected)} tensors of Dynamo's graph in their order",
            remedy="report this with the model: an argument was dropped or put elsewhere",
        )


def _refuse_gradients(*_: object) -> Runnable:
    raise ConfigError(
        "model compiled with backend='bdlora'",
        found="parameters whose gradients are wanted",
        expected="inference",
        remedy="call it under `torch.no_grad()`, or `model.requires_grad_(False)`",
    )
