"""The decode engine: requests join and leave a running batch between steps, each with its own adapter.

One thread runs the steps (`stepping`, `scheduler`); others submit requests and read streams. Between two steps it does
what must not meet a forward: adapters come and go, and `Engine.check` runs a step of its own.
"""

import time
from collections.abc import Callable, Collection
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from bdlora_compile.errors import (
    BdloraError,
    ConfigError,
    EngineClosedError,
    LostRankError,
    QueueFullError,
    RequestError,
    UnknownAdapterError,
)
from bdlora_compile.runtime.adapter_version import AdapterInfo
from bdlora_compile.runtime.adapters import AdapterSet
from bdlora_compile.runtime.selection import NO_ADAPTER
from bdlora_compile.serving.batch import Batch
from bdlora_compile.serving.requests import Request
from bdlora_compile.serving.scheduler import Limits, Scheduler
from bdlora_compile.serving.stats import Counts, EngineStats
from bdlora_compile.serving.stepping import POLL_SECONDS, StepThread, hangs
from bdlora_compile.serving.stream import Stream
from bdlora_compile.serving.text import fast_tokenizer_of

_T = TypeVar("_T")


class Engine:
    """Runs requests over a model and its adapters.

    On rank 0 of several, inside `bdlora_compile.follow`; alone if there is one rank. `start` before the first
    `submit`, or use it as a context manager. All methods may be called from any thread; in an event loop, those that
    wait (`start`, `drain`, `close`, `check`, `load_adapter`, `unload_adapter`) belong into ``asyncio.to_thread``.

    Args:
        model: from `bdlora_compile.load` or `attach`, compiled.
        adapters: its adapters.
        tokenizer: its tokenizer, for texts and stop texts; None gives tokens alone.
        max_rows: requests that run at once, each in a row of the cache.
        max_length: tokens of prompt and completion that a row can hold; no more than the model has positions for.
        max_waiting: requests that wait at most, all together.
        max_waiting_per_adapter: of one adapter, or of the base model.
        prefill_chunk: tokens of a prompt that one step takes: running rows wait no longer than that.
        step_timeout: seconds after which a step counts as hung and the engine as failed.
    """

    def __init__(
        self,
        model: Any,
        adapters: AdapterSet,
        tokenizer: Any | None = None,
        *,
        max_rows: int = 16,
        max_length: int = 2048,
        max_waiting: int = 1024,
        max_waiting_per_adapter: int = 256,
        prefill_chunk: int = 512,
        step_timeout: float = 30.0,
    ) -> None:
        _check_sizes(max_rows, max_length, prefill_chunk, max_waiting, max_waiting_per_adapter)
        _check_positions(model, max_length)
        self._model = model
        self._adapters = adapters
        self._tokenizer = None if tokenizer is None else fast_tokenizer_of(tokenizer)
        self._limits = Limits(max_rows, max_length, max_waiting, max_waiting_per_adapter, prefill_chunk)
        self._step_timeout = step_timeout
        self._state: _State = _State.NEW
        self._steps = StepThread(self._lost, step_timeout)
        self._refused = 0
        self._scheduler: Scheduler | None = None

    @property
    def failed(self) -> BdloraError | None:
        """Why the engine can serve no more: a lost rank, an error in a step, a step that hangs. None while it can.

        Then all streams have ended with this error, and the process should exit.
        """
        return self._steps.failed

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Compile what steps need by running one of each kind, then serve from a thread."""
        if self._state is not _State.NEW:
            raise self._closed("a second start")
        batch = Batch(self._model, self._limits.max_rows, self._limits.max_length)
        self._warm_up(batch)
        eos = eos_of(self._model)
        if self._model.bdlora.watch is not None:
            # This engine watches its steps itself, and ends its streams before the process ends.
            self._model.bdlora.watch.stop()
        self._scheduler = Scheduler(batch, self._adapters, self._tokenizer, eos, self._limits)
        self._state = _State.RUNNING
        self._steps.start(self._scheduler)

    def drain(self, timeout: float) -> bool:
        """Take no new requests and let those that were accepted end; after ``timeout`` s the rest is cancelled.

        Returns:
            Whether all ended by themselves.
        """
        with self._steps.lock:
            if self._state is not _State.RUNNING:
                return self.failed is None
            self._state = _State.DRAINING
        scheduler = self._running_scheduler()
        deadline = time.monotonic() + timeout
        while not scheduler.is_idle and self.failed is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        all_ended = scheduler.is_idle and self.failed is None
        if not all_ended and self.failed is None:
            self._call(lambda: scheduler.end_all("cancelled"))
        return all_ended

    def close(self) -> None:
        """Cancel what runs, end the thread and free the cache. Again is nothing."""
        with self._steps.lock:
            was, self._state = self._state, _State.CLOSED
        if was in (_State.NEW, _State.CLOSED):
            return
        self._steps.stop()
        self._scheduler = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Queue a request; never waits.

        Raises:
            UnknownAdapterError: nobody loaded the adapter.
            RequestError: the prompt is empty, has an id outside the vocabulary, or leaves no room for one token.
                A completion that would not fit ends with reason "length" at the end of its row.
            QueueFullError: too many requests wait, of this adapter or of all.
            EngineClosedError: not started, draining or closed; or failed, then `failed` says why.
        """
        self._check(request)
        stream = Stream(request, self._steps.wake)
        with self._steps.lock:
            if self._state is not _State.RUNNING or self.failed is not None:
                raise self._closed("a request")
            try:
                self._running_scheduler().add(stream)
            except QueueFullError:
                self._refused += 1
                raise
        self._steps.wake()
        return stream

    def check(self, timeout: float | None = None) -> float:
        """Run a real step on all ranks, between others; its seconds. Raises `failed`, or what the step raises.

        Raises:
            EngineClosedError: not running.
            LostRankError: no answer in time (by default `step_timeout`).
        """
        start = time.monotonic()
        limit = self._step_timeout if timeout is None else timeout
        try:
            self._call(self._running_scheduler().check, limit)
        except TimeoutError:
            raise hangs(limit) from None
        return time.monotonic() - start

    def stats(self) -> EngineStats:
        """Counts, at this moment; all zero before `start` and after `close`."""
        scheduler = self._scheduler
        counts = Counts() if scheduler is None else scheduler.counts
        running = {} if scheduler is None else dict(scheduler.running)
        return EngineStats(
            running=running,
            waiting={} if scheduler is None else scheduler.waiting.lengths,
            rows=self._limits.max_rows,
            rows_in_use=sum(running.values()),
            cache_tokens=0 if scheduler is None else scheduler.cache_tokens,
            prompt_tokens=counts.prompt_tokens,
            generated_tokens=counts.generated_tokens,
            decode_steps=counts.decode_steps,
            prefill_steps=counts.prefill_steps,
            step_seconds=counts.step_seconds,
            last_step_seconds=counts.last_step_seconds,
            finished=dict(counts.finished),
            refused=self._refused,
        )

    # --- adapters ---------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, path: str | Path) -> AdapterInfo:
        """As `AdapterSet.load`: files are read beside the steps, the set changes between two of them.

        Rows of a name that is loaded again finish on the former contents; waiting requests begin with the new ones.
        """
        pending = self._call(lambda: self._adapters.begin_load(name, path))
        pending.wait()
        return self._call(pending.commit)

    def unload_adapter(self, name: str) -> None:
        """As `AdapterSet.unload`, between two steps. Rows finish on it; waiting requests of it end with an error."""

        def unload() -> None:
            self._adapters.unload(name)
            self._running_scheduler().end_waiting(name, _unloaded(name))

        self._call(unload)

    # --- the thread -------------------------------------------------------------------------------------------------

    def _call(self, work: Callable[[], _T], timeout: float | None = None) -> _T:
        """Let the engine's thread do something between two steps."""
        with self._steps.lock:
            if self._state in (_State.NEW, _State.CLOSED) and self.failed is None:
                raise self._closed("a call")
            result = self._steps.ask(work)
        return result.result(timeout)

    def _lost(self) -> LostRankError | None:
        leader = self._model.leader
        return None if leader is None else leader.lost

    def _warm_up(self, batch: Batch) -> None:
        """Every graph once, and decode steps often enough to be recorded."""
        first = next(iter(self._adapters.names), None)
        hold = None if first is None else self._adapters.hold(first)
        for slot in [NO_ADAPTER] if hold is None else [NO_ADAPTER, hold.slot]:
            batch.prefill([0, 0], 0, slot, 0)
            for length in range(3):
                batch.decode([0] * batch.num_rows, [length] * batch.num_rows, [slot] * batch.num_rows)
        if hold is not None:
            self._adapters.release(hold)

    # --- checks -----------------------------------------------------------------------------------------------------

    def _running_scheduler(self) -> Scheduler:
        scheduler = self._scheduler
        if scheduler is None:
            raise self._closed("a call")
        return scheduler

    def _closed(self, what: str) -> EngineClosedError:
        found = f"{what} while it is {self._state.value}" if self.failed is None else f"a failure: {self.failed}"
        remedy = "start it, or send the request to another replica"
        return EngineClosedError("engine", found=found, expected="a running engine", remedy=remedy)

    def _check(self, request: Request) -> None:
        if request.adapter is not None:
            self._adapters.version(request.adapter)
        length, vocabulary = len(request.prompt), self._model.config.vocab_size
        if not 1 <= length < self._limits.max_length:
            raise RequestError(
                "prompt",
                found=f"{length} tokens",
                expected=f"1 to {self._limits.max_length - 1}, so that a token can follow",
                remedy="shorten the prompt, or start the engine with a larger max_length",
            )
        if not all(0 <= token < vocabulary for token in request.prompt):
            raise RequestError(
                "prompt",
                found="an id outside the vocabulary",
                expected=f"ids from 0 to {vocabulary - 1}",
                remedy="encode the prompt with the model's own tokenizer",
            )


class _State(Enum):
    NEW = "new"
    RUNNING = "running"
    DRAINING = "draining"
    CLOSED = "closed"


def eos_of(model: Any) -> Collection[int]:
    """Tokens that end a completion, by the model's generation config."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _check_sizes(max_rows: int, max_length: int, prefill_chunk: int, *queues: int) -> None:
    sizes = {"max_rows": (max_rows, 1), "max_length": (max_length, 2), "prefill_chunk": (prefill_chunk, 1)}
    sizes |= {f"max_waiting of {size}": (size, 1) for size in queues}
    for name, (size, least) in sizes.items():
        if size < least:
            raise ConfigError(
                f"Engine({name})", found=str(size), expected=f"at least {least}", remedy="choose a larger one"
            )


def _check_positions(model: Any, max_length: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ConfigError(
            "Engine(max_length)",
            found=str(max_length),
            expected=f"at most {positions}: the model's max_position_embeddings",
            remedy="choose a smaller one",
        )


def _unloaded(name: str) -> UnknownAdapterError:
    return UnknownAdapterError(
        f"adapter {name!r:.60}",
        found="unloaded while the request waited",
        expected="an adapter that is loaded",
        remedy="load it again, then send the request again",
    )
