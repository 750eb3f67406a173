"""Work that reads adapters in the background, and is finished between two forwards."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")

_SLOWEST = timedelta(minutes=10)
_POLL_SECONDS = 0.02


class Pending(Generic[_T]):
    """Adapters that are being read in the background; the set does not change before `commit`.

    Args:
        reading: of this rank.
        all_done: whether all ranks are done reading.
        settle: does `commit`.
    """

    def __init__(self, reading: Future[Any], all_done: Callable[[], bool], settle: Callable[[], _T]) -> None:
        self._reading = reading
        self._all_done = all_done
        self._settle = settle
        self._is_staged = False

    @property
    def is_staged(self) -> bool:
        """Whether all ranks are done reading, well or not: `commit` then waits for no disk."""
        self._is_staged = self._is_staged or (self._reading.done() and self._all_done())
        return self._is_staged

    def wait(self, limit: timedelta = _SLOWEST) -> None:
        """Wait until all ranks are done reading, but for others no longer than ``limit``: `commit` names them then."""
        wait([self._reading])
        deadline = time.monotonic() + limit.total_seconds()
        while not self.is_staged and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def commit(self) -> _T:
        """Agree with all ranks and change the set; raises as the call that waits does (`load`, `prefetch`)."""
        return self._settle()


def in_background(work: Callable[[], _T], then: Callable[[], None]) -> Future[_T]:
    """Start ``work``, and ``then`` whatever became of it, in a thread of its own; both are over when the result is."""

    def run() -> _T:
        try:
            return work()
        finally:
            then()

    worker = ThreadPoolExecutor(1, thread_name_prefix="bdlora-reader")
    result = worker.submit(run)
    worker.shutdown(wait=False)
    return result
