"""Decode steps recorded once as CUDA graphs and replayed: a step then costs the host a few copies and one launch."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map

_LOG = logging.getLogger(__name__)

_LIMIT = 64
"""Recorded steps that are kept; the one that was used longest ago goes first."""

Launch = Callable[[Sequence[Any]], Any]


class Recorder(Protocol):
    """Records what a function launches."""

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Returns: what launches it again, and the tensors in which each launch leaves its results."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one memory pool: they never run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog, uploads of adapters) go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = run()
        self._pool = graph.pool()
        return graph.replay, results


@dataclass(slots=True)
class StepGraphStats:
    """What became of decode steps.

    Attributes:
        recorded: steps recorded, one for each combination of shapes and cache.
        replayed: steps that were one launch.
        plain: steps that ran operator by operator: the first of each combination, and those that were refused.
        refusals: why a step could not be recorded.
    """

    recorded: int = 0
    replayed: int = 0
    plain: int = 0
    refusals: tuple[str, ...] = ()

    def text(self) -> str:
        """One line."""
        counts = f"CUDA graphs: {self.recorded} recorded, {self.replayed} steps replayed, {self.plain} plain"
        return counts + "".join(f"; refused: {reason}" for reason in self.refusals)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A step: its own inputs by the positions of the arguments they stand for, what launches it, its results."""

    inputs: Mapping[int, torch.Tensor]
    replay: Callable[[], None]
    results: Any


class StepGraphs:
    """Runs a program's decode steps, replaying those that it has seen before.

    A step is known by its variant, the shapes of its arguments, and the addresses of those that it writes in place
    (the cache): these are used where they are. Other arguments are copied into tensors of its own. Weights and
    adapters lie at fixed addresses and are read there, so a loaded or evicted adapter needs nothing here. Results are
    copies: the next step does not change them.

    Args:
        arguments: positions of the arguments that the program reads or writes; a call has hundreds that it does not.
        mutated: those that it writes to.
        recorder: what records.
        limit: recorded steps that are kept.
    """

    def __init__(
        self, arguments: frozenset[int], mutated: frozenset[int], recorder: Recorder, limit: int = _LIMIT
    ) -> None:
        self._arguments = sorted(arguments)
        self._mutated = mutated
        self._recorder = recorder
        self._limit = limit
        self._steps: OrderedDict[Hashable, _Recorded | None] = OrderedDict()
        self._refused: set[Hashable] = set()
        self.stats = StepGraphStats()

    def run(self, variant: Hashable, args: Sequence[Any], launch: Launch) -> Any:
        """Run a step: by itself the first time (which also warms up what it calls), recorded from the second on."""
        key = (variant, *(self._signature(index, args[index]) for index in self._arguments))
        if key not in self._steps or key in self._refused:
            self._remember(key, None)
            self.stats.plain += 1
            return launch(args)
        recorded = self._steps[key] or self._record(key, args, launch)
        if recorded is None:
            self.stats.plain += 1
            return launch(args)
        self._steps.move_to_end(key)
        for index, own in recorded.inputs.items():
            own.copy_(args[index])
        recorded.replay()
        self.stats.replayed += 1
        return tree_map(_copied, recorded.results)

    def _record(self, key: Hashable, args: Sequence[Any], launch: Launch) -> _Recorded | None:
        inputs = {
            index: _own_copy(args[index])
            for index in self._arguments
            if index not in self._mutated and isinstance(args[index], torch.Tensor)
        }
        static = [inputs.get(index, value) for index, value in enumerate(args)]
        try:
            replay, results = self._recorder(lambda: launch(static))
        except RuntimeError as error:
            self._refused.add(key)
            self.stats.refusals += (str(error).partition("\n")[0],)
            _LOG.warning("a decode step runs operator by operator, since it cannot be recorded: %s", error)
            return None
        self.stats.recorded += 1
        recorded = _Recorded(inputs, replay, results)
        self._remember(key, recorded)
        return recorded

    def _remember(self, key: Hashable, step: _Recorded | None) -> None:
        self._steps[key] = step
        if len(self._steps) > self._limit:
            oldest, _ = self._steps.popitem(last=False)
            self._refused.discard(oldest)

    def _signature(self, index: int, value: Any) -> Hashable:
        if not isinstance(value, torch.Tensor):
            return value
        address = value.data_ptr() if index in self._mutated else None
        return (value.shape, value.stride(), value.dtype, value.device, address)


def _own_copy(value: torch.Tensor) -> torch.Tensor:
    # Made in inference mode it could not be written to outside.
    with torch.inference_mode(False):
        own = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return own.copy_(value)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
