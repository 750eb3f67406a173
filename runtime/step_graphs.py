"""Forwards recorded once as CUDA graphs and replayed: they then cost the host a few copies and one launch.

Every decode step of a batch is such a forward, and so is every part of a prompt of a size that was seen before.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)

_LIMIT = 64
"""Recorded forwards that are kept; the one that was used longest ago goes first."""

_SEEN_LIMIT = 1024
"""Forwards seen once that are remembered: prompts of all lengths must not push decode steps out."""

_RESULT_BYTES = 64 << 20
"""Bytes of the largest results of a recorded forward: it keeps them, and prompts can have logits for every token."""

Forward = Callable[[Sequence[Any]], Sequence[Any]]
"""Takes arguments, gives results."""


class Recorder(Protocol):
    """Records what a function launches."""

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Returns: what launches it again, and the tensors in which each launch leaves its results."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one memory pool: they never run at the same time.

    On a stream that nothing else uses. A graph holds the address of the workspace that torch keeps for cuBLAS on its
    stream, and torch gives workspaces back while graphs live: when another graph of that stream ends, or another model
    is compiled with ``mode="reduce-overhead"`` (https://github.com/pytorch/pytorch/issues/193402). One that was made
    here goes back to this pool, which stays as long as its graphs; one of a plain forward's stream would be others'
    memory, or unmapped.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        # Each thread has a handle of cuBLAS, and a recording cannot make it: another thread may have warmed up.
        torch.cuda.current_blas_handle()
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        caller = torch.cuda.current_stream()
        try:
            # Other threads (NCCL's watchdog, uploads of adapters) go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                results = run()
        except BaseException:
            self._abandon(caller)
            raise
        return graph.replay, results

    def _abandon(self, caller: torch.cuda.Stream) -> None:
        """What torch leaves of a recording that is broken off: its stream is current, its pool being recorded into."""
        torch.cuda.set_stream(caller)
        with suppress(RuntimeError):  # where it was ended after all
            torch._C._cuda_endAllocateToPool(caller.device_index, self._pool)
        self._pool = self._stream = None


@dataclass(slots=True)
class StepGraphStats:
    """What became of forwards that may be recorded.

    Attributes:
        recorded: forwards recorded, one for each combination of shapes and cache.
        replayed: forwards that were one launch.
        plain: forwards that ran operator by operator: the first of each combination, those that were refused, and those
            with large results.
        refusals: why a forward could not be recorded.
    """

    recorded: int = 0
    replayed: int = 0
    plain: int = 0
    refusals: tuple[str, ...] = ()

    def text(self) -> str:
        """One line."""
        counts = f"CUDA graphs: {self.recorded} recorded, {self.replayed} forwards replayed, {self.plain} plain"
        return counts + "".join(f"; refused: {reason}" for reason in self.refusals)


@dataclass(frozen=True, slots=True)
class _Input:
    """A recorded forward's own tensor in place of an argument. Of expanded dims the first element is all there is."""

    own: Tensor
    expanded: Sequence[int]

    @classmethod
    def like(cls, value: Tensor) -> "_Input":
        expanded = [dim for dim in range(value.ndim) if value.stride(dim) == 0 and value.shape[dim] > 1]
        # Made in inference mode it could not be written to outside.
        with torch.inference_mode(False):
            own = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        made = cls(own, expanded)
        made.once(own).copy_(made.once(value))
        return made

    def once(self, value: Tensor) -> Tensor:
        """A tensor like this one without its repetitions."""
        for dim in self.expanded:
            value = value.narrow(dim, 0, 1)
        return value


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A forward: its own inputs by the positions of the arguments they stand for, what launches it, its results."""

    inputs: Mapping[int, _Input]
    replay: Callable[[], None]
    results: Sequence[Any]


class StepGraphs:
    """Runs a program's forwards, replaying those that it has seen before.

    A forward is known by its variant, the shapes of its arguments, and the places of those that it writes in place (the
    cache) or that stay where they are (buffers of the model): these are used there. Other arguments are copied
    into tensors of its own. Weights and adapters lie at fixed addresses and are read there, so a loaded or evicted
    adapter needs nothing here. Results are copies: the next forward does not change them.

    Args:
        arguments: positions of the arguments that the program reads or writes; a call has hundreds that it does not.
        in_place: those that it uses where they are.
        recorder: makes what records.
        limit: recorded forwards that are kept.
    """

    def __init__(
        self, arguments: frozenset[int], in_place: frozenset[int], recorder: Callable[[], Recorder], limit: int = _LIMIT
    ) -> None:
        self._arguments = [(index, index in in_place) for index in sorted(arguments)]
        self._new_recorder = recorder
        self._recorder = recorder()
        self._limit = limit
        self._refused: set[Hashable] = set()
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()
        self.stats = StepGraphStats()

    def refuse(self, variant: Hashable, reason: str) -> None:
        """Never record forwards of a variant."""
        self._refused.add(variant)
        self.stats.refusals += (reason,)

    def forget(self) -> None:
        """Let go of all recorded forwards; they are recorded anew when they come again."""
        self._recorded.clear()
        self._seen.clear()
        # A memory pool without a graph cannot be recorded into again.
        self._recorder = self._new_recorder()

    def run(self, variant: Hashable, args: Sequence[Any], forward: Forward) -> Sequence[Any]:
        """Run a forward: by itself the first time (which also warms up what it calls), recorded from the second on."""
        if variant in self._refused:
            self.stats.plain += 1
            return forward(args)
        key = (variant, *[_signature(args[index], is_in_place) for index, is_in_place in self._arguments])
        recorded = self._recorded.get(key)
        if recorded is None and self._may_record(key):
            recorded = self._record(key, args, forward)
        if recorded is None:
            self.stats.plain += 1
            results = forward(args)
            if sum(value.nbytes for value in results if isinstance(value, Tensor)) > _RESULT_BYTES:
                self._seen[key] = False
            return results
        self._recorded.move_to_end(key)
        if recorded.inputs:
            own = [kept.once(kept.own) for kept in recorded.inputs.values()]
            torch._foreach_copy_(own, [kept.once(args[index]) for index, kept in recorded.inputs.items()])
        recorded.replay()
        self.stats.replayed += 1
        return [value.clone() if isinstance(value, Tensor) else value for value in recorded.results]

    def _may_record(self, key: Hashable) -> bool:
        """Whether a forward was seen before, and not refused; it has been seen now."""
        is_known = key in self._seen
        may_record = self._seen.setdefault(key, True)
        self._seen.move_to_end(key)
        if len(self._seen) > _SEEN_LIMIT:
            self._seen.popitem(last=False)
        return is_known and may_record

    def _record(self, key: Hashable, args: Sequence[Any], forward: Forward) -> _Recorded | None:
        inputs = {
            index: _Input.like(args[index])
            for index, is_in_place in self._arguments
            if not is_in_place and isinstance(args[index], Tensor)
        }
        static = [inputs[index].own if index in inputs else value for index, value in enumerate(args)]
        try:
            replay, results = self._recorder(partial(forward, static))
        except RuntimeError as error:
            self._seen[key] = False
            cause = _first_error(error)
            self.stats.refusals += (f"{type(cause).__name__}: {cause}".partition("\n")[0],)
            _LOG.warning("a forward runs operator by operator, since it cannot be recorded: %s", cause, exc_info=error)
            return None
        self.stats.recorded += 1
        if len(self._recorded) >= self._limit:
            oldest, _ = self._recorded.popitem(last=False)
            self._seen.pop(oldest, None)
        recorded = self._recorded[key] = _Recorded(inputs, replay, results)
        return recorded


def _signature(value: Any, is_in_place: bool) -> Hashable:
    if not isinstance(value, Tensor):
        return value
    # The number of a cache, too: whether a forward is known must not depend on a rank's own addresses.
    place = (value.data_ptr(), getattr(value, "bdlora_number", None)) if is_in_place else None
    return (value.shape, value.stride(), value.dtype, value.device, place)


def _first_error(error: BaseException) -> BaseException:
    """What went wrong first: a recording that is broken off raises an error of its own, which says nothing."""
    while error.__context__ is not None:
        error = error.__context__
    return error
