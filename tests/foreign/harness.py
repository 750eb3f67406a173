"""All ranks of a hand-sharded model in one process: each rank's graph is captured, rewritten, and run in lock-step.

Ranks' graphs differ (each has its own slices in it), so each is captured under the fake process group as that rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from bdlora_compile.foreign.capture import ForeignGraph, Runnable, capture_through_aot
from bdlora_compile.foreign.compile import localize
from bdlora_compile.report import Report
from bdlora_compile.runtime import lockstep
from bdlora_compile.runtime.agreement import Agreement, Alone
from bdlora_compile.runtime.foreign_program import parts_for_ranks, rebuilt_sources

Block = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class RankRun:
    """One rank's graph and the arguments of its call."""

    foreign: ForeignGraph
    report: Report
    arguments: Sequence[Any] = ()


@contextmanager
def fake_rank(rank: int, size: int) -> Iterator[None]:
    """This process is ``rank`` of ``size`` that are not there."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def capture(
    build: Callable[[], Block],
    rank: int,
    size: int,
    x: Tensor,
    *,
    dynamic: bool = False,
    agreement: Agreement | None = None,
    has_views: bool = False,
) -> RankRun:
    """The rewritten graph of one rank, with what it was called with."""
    runs: list[RankRun] = []

    def backend(module: GraphModule, example_inputs: Sequence[Any]) -> Runnable:
        def compile_graph(foreign: ForeignGraph, fakes: Sequence[Any]) -> Runnable:
            runs.append(RankRun(foreign, localize(foreign, agreement or Alone(), has_views=has_views)))

            def remember(*arguments: Any) -> Any:
                # All blocks here give back what looks like what they take.
                runs[-1].arguments = arguments
                return [torch.zeros_like(x)]

            return remember

        return capture_through_aot(module, example_inputs, compile_graph)

    torch._dynamo.reset()
    with fake_rank(rank, size), torch.no_grad():
        torch.compile(build(), backend=backend, fullgraph=True, dynamic=dynamic or None)(x)
    (run,) = runs
    return run


def run_all_ranks(
    build: Callable[[int], Callable[[], Block]], size: int, x: Tensor, *, dynamic: bool = False
) -> tuple[list[Tensor], list[RankRun]]:
    """(each rank's result, each rank's run); ``build(rank)`` makes the rank's model."""
    runs = [capture(build(rank), rank, size, x, dynamic=dynamic) for rank in range(size)]
    sources = [rebuilt_sources(run.foreign.captured.graph) for run in runs]
    steps = []
    for rank, run in enumerate(runs):
        factors = []
        for position in range(len(sources[rank])):
            given = [
                parts_for_ranks(own[position], other.foreign.tensors[own[position].index])[rank]
                for own, other in zip(sources, runs, strict=True)
            ]
            factors.append(torch.cat(given, dim=1))
        steps.append(lockstep._steps(run.foreign.captured.graph, [*run.arguments, *factors]))
    with torch.no_grad():
        results = lockstep._run_together(steps)
    return [result[0] for result in results], runs
