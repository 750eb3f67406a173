"""Requests that wait, and which adapter's turn it is.

Fair by service, as the virtual token counter of "Fairness in Serving Large Language Models" (arXiv 2401.00588): each
adapter has a counter of the tokens it was served, the one with the smallest counter is next, and within an adapter the
oldest request. An adapter that comes back starts at the counter of the one served last: what it did not ask for it
cannot claim later. So among adapters that always have requests waiting, the tokens served differ by no more than what
their rows can hold, however many requests one of them sends.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Generic, TypeVar

from bdlora_compile.errors import QueueFullError

Key = str | None
"""An adapter's name, None for the base model."""

_T = TypeVar("_T")


class Readiness(Enum):
    """Whether an adapter's requests can run."""

    READY = "now"
    NO_ROOM = "when others have ended: those that run before it take what it waits for"
    COMING = "soon, whatever others do meanwhile"


class FairQueues(Generic[_T]):
    """One queue for each adapter. Any thread may put; one thread takes.

    Args:
        limit: items in all queues.
        limit_each: items in one.
    """

    def __init__(self, limit: int, limit_each: int) -> None:
        self._lock = threading.RLock()
        self._limit = limit
        self._limit_each = limit_each
        self._queues: dict[Key, deque[_T]] = {}
        self._served: dict[Key, int] = {}
        self._passed: dict[Key, int] = {}
        self._clock = 0

    def __len__(self) -> int:
        return sum(self.lengths.values())

    @property
    def lengths(self) -> Mapping[Key, int]:
        """Items that wait, by adapter."""
        with self._lock:
            return {key: len(queue) for key, queue in self._queues.items()}

    def put(self, key: Key, item: _T) -> None:
        """Add an item to the end of its queue.

        Raises:
            QueueFullError: a limit is reached.
        """
        with self._lock:
            waiting, total = len(self._queues.get(key, ())), len(self)
            if total >= self._limit or waiting >= self._limit_each:
                raise self._full(key, waiting, total)
            if key not in self._queues:
                self._queues[key] = deque()
                self._served[key] = max(self._served.get(key, 0), self._clock)
            self._queues[key].append(item)

    def _full(self, key: Key, waiting: int, total: int) -> QueueFullError:
        whose = "the base model" if key is None else f"adapter {key!r}"
        return QueueFullError(
            "queue",
            found=f"{waiting} requests of {whose} waiting, {total} in all",
            expected=f"fewer than {self._limit_each} of one, and than {self._limit} in all",
            remedy="send it again later, or start more replicas",
        )

    def next(self, readiness: Callable[[Key], Readiness], patience: int) -> tuple[Key] | None:
        """Whose turn it is, in a tuple since a key may be None; None if it is nobody's.

        An adapter that has no room is passed over, ``patience`` times at most: then nobody is served before it.

        Args:
            readiness: whether an adapter can run now.
            patience: how often others may overtake one that has no room.
        """
        overtaken: list[Key] = []
        with self._lock:
            order = sorted(self._queues, key=self._served.__getitem__)
        for key in order:
            # Asking may take long, and may empty a queue: not under the lock.
            found = readiness(key)
            if found is Readiness.READY:
                for other in overtaken:
                    self._passed[other] = self._passed.get(other, 0) + 1
                return (key,)
            if found is Readiness.COMING:
                continue
            if self._passed.get(key, 0) >= patience:
                return None
            if key in self._queues:
                overtaken.append(key)
        return None

    def pop(self, key: Key) -> _T:
        """Take the oldest item of a queue."""
        with self._lock:
            item = self._queues[key].popleft()
            self._passed.pop(key, None)
            self._clock = max(self._clock, self._served[key])
            self._drop_if_empty(key)
            return item

    def charge(self, key: Key, tokens: int) -> None:
        """Count tokens that an adapter was served."""
        with self._lock:
            self._served[key] = self._served.get(key, self._clock) + tokens

    def remove(self, leaves: Callable[[_T], bool]) -> list[_T]:
        """Take out all items for which ``leaves`` says so."""
        gone: list[_T] = []
        with self._lock:
            for key, queue in list(self._queues.items()):
                stay: deque[_T] = deque()
                for item in queue:
                    (gone if leaves(item) else stay).append(item)
                self._queues[key] = stay
                self._drop_if_empty(key)
        return gone

    def _drop_if_empty(self, key: Key) -> None:
        if self._queues[key]:
            return
        del self._queues[key]
        self._passed.pop(key, None)
        # Counters that a newcomer would start at anyway need not be kept: names come and go.
        self._served = {
            one: tokens for one, tokens in self._served.items() if one in self._queues or tokens > self._clock
        }
