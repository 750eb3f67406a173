"""Compiling one region of a graph with Inductor."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch._functorch.config as functorch_config
import torch.compiler.config as compiler_config
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node

from bdlora_compile.ir import fake_value, is_symbol, operator_name, placeholders
from bdlora_compile.printer import type_text
from bdlora_compile.runtime.program import CallSource
from bdlora_compile.version import __version__


def compile_region(
    module: GraphModule,
    values: Sequence[torch.Tensor | CallSource],
    on_code: Callable[[str], None] | None = None,
) -> Callable[..., Any]:
    """Compile a region; constants enter as fakes of fixed shape, arguments in the sizes that Dynamo gave them.

    Args:
        module: the region.
        values: what fills its placeholders (in its first step).
        on_code: called with the code that Inductor made.
    """
    outer = TracingContext.get()
    mode = outer.fake_mode
    assert mode is not None, "Dynamo traces under a fake mode"
    inputs = [_example_input(value, node, mode) for value, node in zip(values, placeholders(module.graph), strict=True)]
    return _compile(module, inputs, mode, on_code)


def compile_flat(
    module: GraphModule, inputs: Sequence[Any], on_code: Callable[[str], None] | None = None
) -> Callable[..., Any]:
    """Compile a graph in ATen operators; inputs are fakes, symbols and real tensors of fixed shape."""
    mode = TracingContext.get().fake_mode
    assert mode is not None, "AOTAutograd traces under a fake mode"
    fakes = [
        mode.from_tensor(value, static_shapes=True)
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        else value
        for value in inputs
    ]
    return _compile(module, fakes, mode, on_code)


def _compile(
    module: GraphModule, inputs: Sequence[Any], mode: FakeTensorMode, on_code: Callable[[str], None] | None
) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # importing Inductor takes seconds

    def tell(graph: GraphModule, examples: Sequence[Any], **settings: Any) -> Any:
        result = compile_fx_inner(graph, examples, **settings)
        # Also where it comes from Inductor's own cache.
        if on_code is not None and isinstance(code := getattr(result, "source_code", None), str):
            on_code(code)
        return result

    # A context of its own: the compiler notes facts about one graph in it (strides of outputs, parameters).
    tagged = compiler_config.patch(cache_key_tag=_cache_key_tag(module))  # type: ignore[attr-defined]  # made at run time
    with tracing(TracingContext(mode)), tagged:
        if on_code is None:
            return cast(Callable[..., Any], compile_fx(module, inputs))
        # AOTAutograd's cache would answer before Inductor is asked.
        with functorch_config.patch(enable_autograd_cache=False):
            return cast(Callable[..., Any], compile_fx(module, inputs, inner_compile=tell))


def _cache_key_tag(module: GraphModule) -> str:
    """Our operators' signatures and their results' shapes, as a part of the key by which torch keeps code on disk.

    That code calls them with all arguments spelled out and counts on these shapes, and the key has no more than their
    names: code of another version of this package would be found, and would call operators that have changed since.
    """
    own = {
        f"{getattr(node.target, '_schema', node.target)}: {type_text(fake_value(node))}"
        for node in module.graph.nodes
        if operator_name(node).startswith("bdlora::")
    }
    return "\n".join([compiler_config.cache_key_tag, f"bdlora_compile {__version__}", *sorted(own)])


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
