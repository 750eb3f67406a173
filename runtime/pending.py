"""Work that reads adapters in the background, and is finished between two forwards."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class Pending(Generic[_T]):
    """Adapters that are being read in the background; the set does not change before `commit`."""

    def __init__(self, reading: Future[Any], settle: Callable[[], _T]) -> None:
        self._reading = reading
        self._settle = settle

    @property
    def is_staged(self) -> bool:
        """Whether this rank is done reading, well or not: `commit` then waits for the other ranks only."""
        return self._reading.done()

    def wait(self) -> None:
        """Wait until this rank is done reading."""
        wait([self._reading])

    def commit(self) -> _T:
        """Agree with all ranks and change the set; raises as the call that waits does (`load`, `prefetch`)."""
        return self._settle()


def in_background(work: Callable[[], _T]) -> Future[_T]:
    """Start ``work`` in a thread of its own."""
    worker = ThreadPoolExecutor(1, thread_name_prefix="bdlora-reader")
    result = worker.submit(work)
    worker.shutdown(wait=False)
    return result
