"""Names for profilers: a range around each node, or each region, called by the key that the inspector shows.

On CUDA the ranges are NVTX ranges, which Nsight Systems shows; everywhere they are those of ``torch.profiler``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from bdlora_compile.ir import node_key


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """A range of the running profilers."""
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if is_cuda:
            torch.cuda.nvtx.range_pop()


class RangedModule(Interpreter):
    """A graph that runs node by node, each in a range that its key names.

    Args:
        module: the graph.
    """

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)

    def __call__(self, *args: Any) -> Any:
        """Run it; arguments are those of the module."""
        return self.run(*args, enable_io_processing=False)

    def run_node(self, n: Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        with named_range(node_key(n) or n.name):
            return super().run_node(n)


def in_range(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` inside a range."""

    def ranged(*args: Any) -> Any:
        with named_range(name):
            return run(*args)

    return ranged
