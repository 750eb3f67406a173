"""Requests that wait, and which adapter's turn it is.

Fair by service, as the virtual token counter of "Fairness in Serving Large Language Models" (arXiv 2401.00588): each
adapter has a counter of the tokens it was served, the one with the smallest counter is next, and within an adapter the
oldest request. An adapter that comes back starts at the counter of the one served last: what it did not ask for it
cannot claim later. So among adapters that always have requests waiting, the tokens served differ by no more than what
their rows can hold, however many requests one of them sends.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from bdlora_compile.errors import QueueFullError

Key = str | None
"""An adapter's name, None for the base model."""

_T = TypeVar("_T")


class FairQueues(Generic[_T]):
    """One queue for each adapter.

    Args:
        limit: items in all queues.
        limit_each: items in one.
    """

    def __init__(self, limit: int, limit_each: int) -> None:
        self._limit = limit
        self._limit_each = limit_each
        self._queues: dict[Key, deque[_T]] = {}
        self._served: dict[Key, int] = {}
        self._passed: dict[Key, int] = {}
        self._clock = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[_T]:
        for queue in self._queues.values():
            yield from queue

    @property
    def lengths(self) -> Mapping[Key, int]:
        """Items that wait, by adapter."""
        return {key: len(queue) for key, queue in self._queues.items()}

    def put(self, key: Key, item: _T) -> None:
        """Add an item to the end of its queue.

        Raises:
            QueueFullError: a limit is reached.
        """
        waiting = len(self._queues.get(key, ()))
        if len(self) >= self._limit or waiting >= self._limit_each:
            what = (
                f"{waiting} requests of {'the base model' if key is None else f'adapter {key!r}'}, {len(self)} in all"
            )
            raise QueueFullError(
                "queue",
                found=f"{what} waiting",
                expected=f"fewer than {self._limit_each} and {self._limit}",
                remedy="send it again later, or start more replicas",
            )
        if key not in self._queues:
            self._queues[key] = deque()
            self._served[key] = max(self._served.get(key, 0), self._clock)
        self._queues[key].append(item)

    def next(self, can_run: Callable[[Key], bool], patience: int) -> tuple[Key] | None:
        """Whose turn it is, in a tuple since a key may be None; None if it is nobody's.

        An adapter that cannot run now is passed over, ``patience`` times at most: then nobody is served before it.

        Args:
            can_run: whether an adapter can run now.
            patience: how often others may overtake one that cannot.
        """
        overtaken: list[Key] = []
        for key in sorted(self._queues, key=lambda key: self._served[key]):
            if can_run(key):
                for other in overtaken:
                    self._passed[other] = self._passed.get(other, 0) + 1
                return (key,)
            if self._passed.get(key, 0) >= patience:
                return None
            overtaken.append(key)
        return None

    def pop(self, key: Key) -> _T:
        """Take the oldest item of a queue."""
        item = self._queues[key].popleft()
        self._passed.pop(key, None)
        self._clock = max(self._clock, self._served[key])
        self._drop_if_empty(key)
        return item

    def charge(self, key: Key, tokens: int) -> None:
        """Count tokens that an adapter was served."""
        self._served[key] = self._served.get(key, self._clock) + tokens

    def remove(self, leaves: Callable[[_T], bool]) -> list[_T]:
        """Take out all items for which ``leaves`` says so."""
        gone: list[_T] = []
        for key, queue in list(self._queues.items()):
            chosen = [item for item in queue if leaves(item)]
            if chosen:
                gone += chosen
                self._queues[key] = deque(item for item in queue if item not in chosen)
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
