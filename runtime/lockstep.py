"""All ranks of a mesh in one process: each rank's graph advances to its next collective, which is then done in torch.

For tests and for looking at things: no process group, no network, values of every rank in reach. Every rank runs the
very graph that a real launch would run on it.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from bdlora_compile.collectives import ALL_GATHER, ALL_REDUCE, WAIT, is_collective
from bdlora_compile.errors import AgreementError, PassError
from bdlora_compile.ir import CacheSource, InputSource, operator_name
from bdlora_compile.runtime.cache import hosted
from bdlora_compile.runtime.deployment import Deployment
from bdlora_compile.runtime.program import CallSource, Flow

_Step = tuple[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class LockStepRegion:
    """One run of a region on all ranks.

    Attributes:
        graph: the region, the same for all ranks.
        values: for each rank, a bound tensor for each placeholder, or what of a call fills it.
    """

    graph: Graph
    values: Sequence[Sequence[torch.Tensor | CallSource]]


class LockStepProgram:
    """The graphs of all ranks, run together; returns what rank 0 returns.

    Args:
        deployment: the model's state, hosting every rank.
        with_lora, base_only: the two graphs of a forward, as for `Program`.
        token_index: the argument whose first two dims are [batch, seq].
    """

    def __init__(
        self,
        deployment: Deployment,
        with_lora: Sequence[LockStepRegion],
        base_only: Sequence[LockStepRegion],
        token_index: int,
    ) -> None:
        self._deployment = deployment
        self._with_lora = with_lora
        self._base_only = base_only
        self._token_index = token_index

    def __call__(self, *args: Any) -> Any:
        """Run all ranks.

        Raises:
            AgreementError: ranks reach different collectives, or end with different results.
        """
        with self._deployment.step:
            return self._run(args)

    def _run(self, args: Sequence[Any]) -> Any:
        batch, seq = args[self._token_index].shape[:2]
        regions = self._with_lora if self._deployment.select(batch, seq) else self._base_only
        flows = [Flow(_rank_arguments(args, regions, rank)) for rank in range(len(self._deployment.ranks))]
        results: list[Any] = []
        with torch.no_grad():
            for region in regions:
                if results:
                    for flow, result in zip(flows, results, strict=True):
                        flow.take(result)
                arguments = [flow.arguments(own) for flow, own in zip(flows, region.values, strict=True)]
                results = run_ranks(region.graph, arguments)
        for rank, (result, flow) in enumerate(zip(results[1:], flows[1:], strict=True), start=1):
            _require_same(results[0], result, f"results of rank {rank}")
            _require_same_inputs(regions, flows[0].args, flow.args, rank)
        return results[0]


def _require_same_inputs(
    regions: Sequence[LockStepRegion], first: Sequence[Any], other: Sequence[Any], rank: int
) -> None:
    """Inputs that a graph writes (lengths of a cache) must end equal on all ranks."""
    for source in _inputs(regions):
        value = first[source.index]
        if not source.rank_local and isinstance(value, torch.Tensor):
            _require_same([value], [other[source.index]], f"input {source.index} of rank {rank}")


def _inputs(regions: Sequence[LockStepRegion]) -> Sequence[InputSource]:
    """The arguments that the regions read, each once."""
    values = (value for region in regions for value in region.values[0])
    return list(dict.fromkeys(value for value in values if isinstance(value, InputSource)))


def run_ranks(graph: Graph, arguments: Sequence[Sequence[Any]]) -> list[Any]:
    """Run one graph for several ranks, each with its own arguments; what it returns on each.

    Raises:
        AgreementError: ranks reach different collectives.
    """
    return _run_together([_steps(graph, own) for own in arguments])


def _rank_arguments(args: Sequence[Any], regions: Sequence[LockStepRegion], rank: int) -> list[Any]:
    """Rank 0 gets the caller's tensors; others their own caches, and copies of what all ranks share."""
    own = list(args)
    for region in regions:
        for value in region.values[0]:
            if isinstance(value, CacheSource):
                own[value.index] = hosted(args[value.index])[rank]
    for source in _inputs(regions):
        argument = args[source.index]
        if source.rank_local:
            own[source.index] = hosted(argument)[rank]
        elif rank and isinstance(argument, torch.Tensor):
            own[source.index] = argument.clone()
    return own


def _steps(graph: Graph, arguments: Sequence[Any]) -> Generator[_Step, torch.Tensor, Any]:
    """Run one rank, stopping at every collective; the value sent back is its result."""
    values: dict[Node, Any] = {}
    remaining = iter(arguments)
    for node in graph.nodes:
        args = map_arg(node.args, values.__getitem__)
        kwargs = map_arg(node.kwargs, values.__getitem__)
        if node.op == "placeholder":
            values[node] = next(remaining)
        elif node.op == "output":
            return args[0]
        elif is_collective(node):
            values[node] = yield operator_name(node), args[0]
        elif operator_name(node) == WAIT:
            values[node] = args[0]
        elif node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target), f"{node.name}: target of a call_function is callable"
            values[node] = node.target(*args, **kwargs)
    return None


def _run_together(ranks: Sequence[Generator[_Step, torch.Tensor, Any]]) -> list[Any]:
    """Advance all ranks from collective to collective until all return."""
    waiting = [_advance(rank, None) for rank in ranks]
    while any(isinstance(step, tuple) for step, _ in waiting):
        steps = [step for step, _ in waiting if isinstance(step, tuple)]
        names = {name for name, _ in steps}
        if len(steps) != len(ranks) or len(names) != 1:
            raise AgreementError(
                "lock-step ranks",
                found=f"{[step[0] if isinstance(step, tuple) else 'end' for step, _ in waiting]}",
                expected="the same collective on every rank",
                remedy="compare the ranks' graphs",
            )
        results = _collect(names.pop(), [operand for _, operand in steps])
        waiting = [_advance(rank, result) for rank, result in zip(ranks, results, strict=True)]
    return [result for _, result in waiting]


def _advance(rank: Generator[_Step, torch.Tensor, Any], sent: torch.Tensor | None) -> tuple[_Step | None, Any]:
    try:
        return (next(rank) if sent is None else rank.send(sent)), None
    except StopIteration as end:
        return None, end.value


def _collect(name: str, operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What the collective gives each rank."""
    match name:
        case str() if name == ALL_REDUCE:
            total = torch.stack(list(operands)).sum(0)
            return [total.clone() for _ in operands]
        case str() if name == ALL_GATHER:
            return [torch.cat(list(operands)) for _ in operands]
        case _:
            raise PassError(
                f"collective {name}",
                found="no lock-step implementation",
                expected=f"{ALL_REDUCE} or {ALL_GATHER}",
                remedy="add it to `runtime/lockstep.py`",
            )


def _require_same(first: Any, other: Any, what: str) -> None:
    for a, b in zip(first, other, strict=True):
        if isinstance(a, torch.Tensor) and not torch.equal(a, b):
            raise AgreementError(
                what,
                found=f"values that differ from rank 0's by up to {(a - b).abs().max():g}",
                expected="the same on all ranks",
                remedy="a value that is not whole left the graph: look at the placements of the last stage",
            )
