"""The decode engine: requests join and leave a running batch between steps, each with its own adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bdlora_compile.errors import BdloraError
from bdlora_compile.runtime.adapter_version import AdapterInfo
from bdlora_compile.runtime.adapters import AdapterSet
from bdlora_compile.serving.requests import Request
from bdlora_compile.serving.stream import Stream


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine holds and what it did; counts are since `Engine.start`.

    Attributes:
        running: requests that have a row, by adapter (None: the base model).
        waiting: requests that have none yet, by adapter.
        rows: rows of the cache.
        rows_in_use: of these, how many a request has.
        cache_tokens: tokens that the rows in use hold.
        prompt_tokens, generated_tokens: of all requests so far.
        decode_steps: forwards of one token for each row.
        prefill_steps: forwards of a part of a prompt.
        step_seconds: time in all steps.
        last_step_seconds: of the last decode step.
        finished: requests that ended, by reason.
        refused: requests that `Engine.submit` refused because a queue was full.
    """

    running: Mapping[str | None, int]
    waiting: Mapping[str | None, int]
    rows: int
    rows_in_use: int
    cache_tokens: int
    prompt_tokens: int
    generated_tokens: int
    decode_steps: int
    prefill_steps: int
    step_seconds: float
    last_step_seconds: float
    finished: Mapping[str, int]
    refused: int


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
        max_length: tokens of prompt and completion that a row can hold.
        max_waiting: requests that wait at most, all together.
        max_waiting_per_adapter: of one adapter, or of the base model.
        prefill_chunk: tokens of a prompt that one step takes: running rows wait no longer than that.
        step_timeout: seconds after which a step counts as hung and the engine as failed.

    Attributes:
        failed: why the engine can serve no more (a lost rank, an error in a step, a step that hangs); None while it
            can. Then all streams have ended with this error, and the process should exit.
    """

    failed: BdloraError | None

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
        raise NotImplementedError

    def start(self) -> None:
        """Compile what steps need by running one of each kind, then serve from a thread."""
        raise NotImplementedError

    def submit(self, request: Request) -> Stream:
        """Queue a request; never waits.

        Raises:
            UnknownAdapterError: nobody loaded the adapter.
            RequestError: the prompt is empty, has an id outside the vocabulary, or leaves no room for one token.
                A completion that would not fit ends with reason "length" at the end of its row.
            QueueFullError: too many requests wait, of this adapter or of all.
            EngineClosedError: not started, draining or closed; or failed, then `failed` says why.
        """
        raise NotImplementedError

    def drain(self, timeout: float) -> bool:
        """Take no new requests and let those that were accepted end; after ``timeout`` s the rest is cancelled.

        Returns:
            Whether all ended by themselves.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Cancel what runs, end the thread and free the cache. Again is nothing."""
        raise NotImplementedError

    def check(self, timeout: float | None = None) -> float:
        """Run a real step on all ranks, between others; its seconds. Raises `failed`, or what the step raises.

        Raises:
            EngineClosedError: not running.
            LostRankError: no answer in time (by default `step_timeout`).
        """
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """Counts, at this moment."""
        raise NotImplementedError

    def load_adapter(self, name: str, path: str | Path) -> AdapterInfo:
        """As `AdapterSet.load`: files are read beside the steps, the set changes between two of them.

        Rows of a name that is loaded again finish on the former contents; waiting requests begin with the new ones.
        """
        raise NotImplementedError

    def unload_adapter(self, name: str) -> None:
        """As `AdapterSet.unload`, between two steps. Rows finish on it; waiting requests of it end with an error."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
