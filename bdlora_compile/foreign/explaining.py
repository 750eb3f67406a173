"""Tell what `localize` would remove from a model that its owner sharded, with its inputs and nothing else.

The model is traced once, as on a run, and its graph goes through the passes of `compile.py`. Nothing is rebuilt,
compiled or communicated: what the traced forward returns is zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from bdlora_compile.collectives import group_named
from bdlora_compile.declared import declaration_of
from bdlora_compile.errors import ConfigError
from bdlora_compile.explanation import Explanation, RankComparison
from bdlora_compile.foreign.capture import ForeignGraph, Runnable, capture_through_aot, is_foreign
from bdlora_compile.foreign.compile import localize
from bdlora_compile.foreign.paths import GroupMember
from bdlora_compile.foreign.pretend import pretend_ranks
from bdlora_compile.ir import fake_value
from bdlora_compile.run_report import compare_ranks, record_of
from bdlora_compile.runtime.agreement import agreement_of
from bdlora_compile.tracing import own_errors, with_own_code

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""Arguments of a model: one tensor, a sequence by position, or a mapping by name."""


def is_of_others(model: Callable[..., Any]) -> bool:
    """Whether its owner sharded a model: all but a transformers model whose parameters are plain and whole."""
    if not isinstance(model, PreTrainedModel):
        return True
    parameters = [*model.parameters()]
    is_declared = any(declaration_of(parameter) is not None for parameter in parameters)
    has_dtensors = any(isinstance(parameter, DTensor) for parameter in parameters)
    return is_declared or has_dtensors or (getattr(model, "tp_size", None) or 1) > 1


def explain_sharded(model: Callable[..., Any], inputs: Inputs, tp_size: int, name: str = "") -> Explanation:
    """Tell what the backend does to a model that its owner sharded, for one forward.

    Args:
        model: a module or a function, as this rank has it. With a process group all its ranks must call, and their
            graphs are compared; without one the ranks are pretended (see `pretend_ranks`).
        inputs: arguments of the forward; numbers are for these sizes.
        tp_size: ranks that share the model.
        name: what to call it; by default the name of its class or function.

    Raises:
        ConfigError: the forward is more than one graph, has nothing that is sharded, or is shared by another number
            of ranks.
    """
    title = name or getattr(model, "__name__", type(model).__name__)
    records: list[Explanation] = []

    def look(module: GraphModule, example_inputs: Sequence[Any]) -> Runnable:
        if not is_foreign(module):
            raise ConfigError(
                title,
                found="no collective, no DTensor and no declared factor in its forward",
                expected="a model that its owner sharded",
                remedy="leave out the inputs to explain a model that bdlora shards itself",
            )
        return capture_through_aot(module, example_inputs, lambda graph, _: _look(graph, title, tp_size, records))

    names = [*inputs] if isinstance(inputs, Mapping) else []
    values = [inputs] if isinstance(inputs, Tensor) else [*(inputs.values() if isinstance(inputs, Mapping) else inputs)]
    run = torch.compile(_forward_of(model, names), backend=look, fullgraph=True)
    try:
        with nullcontext() if dist.is_initialized() else pretend_ranks(tp_size), own_errors(), torch.no_grad():
            run(*values)
    except Unsupported as error:
        raise ConfigError(
            title,
            found=f"a forward that is no single graph: {str(error).strip().splitlines()[0]}",
            expected="one that Dynamo captures whole",
            remedy="take out what breaks the graph (TORCH_LOGS=graph_breaks names the line)",
        ) from error
    (told,) = records
    return told


def _look(foreign: ForeignGraph, title: str, tp_size: int, records: list[Explanation]) -> Runnable:
    largest = max(foreign.groups.values(), key=lambda member: member.size, default=GroupMember(0, tp_size))
    if largest.size != tp_size:
        raise ConfigError(
            f"tp_size={tp_size}",
            found=f"collectives over {largest.size} ranks",
            expected=f"{tp_size}",
            remedy="give the number of ranks that the model was sharded for",
        )
    agreement = agreement_of([group_named(name) for name in foreign.groups])
    report = localize(foreign, agreement, has_views=True)
    report.model = title
    ranks: RankComparison = compare_ranks(report, agreement, largest.rank)
    records.append(record_of(report, "forward", ranks, "foreign", ""))
    results = [_zeros(fake_value(node)) for node in tree_leaves(foreign.captured.graph.output_node().args)]
    return lambda *_: results


def _zeros(value: object) -> object:
    """What stands for a result that nobody reads."""
    if isinstance(value, Tensor):
        sizes = [size if isinstance(size, int) else size.node.hint for size in value.shape]
        return torch.zeros(sizes, dtype=value.dtype, device=value.device)
    return value.node.hint if isinstance(value, torch.SymInt) else value


def _forward_of(model: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """The model as a function of values, the last of them by name."""

    def forward(*values: Any) -> Any:
        by_position = len(values) - len(names)
        return model(*values[:by_position], **dict(zip(names, values[by_position:], strict=True)))

    return with_own_code(forward)
