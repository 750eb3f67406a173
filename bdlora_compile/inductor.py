"""Compiling one region of a graph with Inductor."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node

from bdlora_compile.ir import fake_value, is_symbol, placeholders
from bdlora_compile.runtime.program import CallSource


def compile_region(module: GraphModule, values: Sequence[torch.Tensor | CallSource]) -> Callable[..., Any]:
    """Compile a region; constants enter as fakes of fixed shape, arguments in the sizes that Dynamo gave them.

    Args:
        module: the region.
        values: what fills its placeholders (in its first step).
    """
    from torch._inductor.compile_fx import compile_fx  # importing Inductor takes seconds

    outer = TracingContext.get()
    mode = outer.fake_mode
    assert mode is not None, "Dynamo traces under a fake mode"
    inputs = [_example_input(value, node, mode) for value, node in zip(values, placeholders(module.graph), strict=True)]
    # A context of its own: the compiler notes facts about one graph in it (strides of outputs, parameters).
    with tracing(TracingContext(mode)):
        compiled: Any = compile_fx(module, inputs)
    return cast(Callable[..., Any], compiled)


def compile_flat(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph in ATen operators; inputs are fakes, symbols and real tensors of fixed shape."""
    from torch._inductor.compile_fx import compile_fx  # importing Inductor takes seconds

    mode = TracingContext.get().fake_mode
    assert mode is not None, "AOTAutograd traces under a fake mode"
    fakes = [
        mode.from_tensor(value, static_shapes=True)
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        else value
        for value in inputs
    ]
    with tracing(TracingContext(mode)):
        compiled: Any = compile_fx(module, fakes)
    return cast(Callable[..., Any], compiled)


def _example_input(value: torch.Tensor | CallSource, node: Node, mode: FakeTensorMode) -> Any:
    if isinstance(value, torch.Tensor):
        return mode.from_tensor(value, static_shapes=True)
    known = fake_value(node)
    if is_symbol(node) or not isinstance(known, torch.Tensor):
        return known
    # Not Dynamo's own inputs: torch 2.11 gives real tensors, whose sizes would become new symbols. Values that
    # propagation shares between nodes would look like one input given twice.
    with mode:
        return torch.empty_strided(known.shape, known.stride(), dtype=known.dtype, device=known.device)
