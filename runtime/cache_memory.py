"""Memory of caches, with a number; a cache that has ended leaves its own to the next one of its size.

A recorded forward uses a cache where it lies, and it may hold collectives, which all ranks have to record, replay or
launch alike. By addresses ranks could disagree whether a forward is known: an allocator decides them. By numbers they
cannot: caches are made in the same order on all ranks, or their numbers come from rank 0 (`serving.messages`).
"""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

_KEPT_BYTES = 1 << 30
"""Bytes of ended caches that are kept where memory for another is needed."""

Size = tuple[int, int]
"""Rows, and tokens that a row can hold."""


@dataclass(frozen=True, slots=True, eq=False)
class CacheMemory:
    """What a cache is made of.

    Attributes:
        number: the same on all ranks, and of no other cache that is there.
        store, lengths, starts: see `cache.LocalCache`.
        tensors: all that the hosted ranks hold, to be cleared.
    """

    number: Hashable
    store: Tensor
    lengths: Tensor
    starts: Tensor
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Of this process."""
        return sum(tensor.nbytes for tensor in self.tensors)


class CacheMemories:
    """Gives memory to new caches, and takes it back; from any thread.

    Args:
        make: new memory of a size, all zeros, under a number.
        order: lets what is launched next on the current stream run behind all forwards before.
    """

    def __init__(self, make: Callable[[Size, Hashable], CacheMemory], order: Callable[[], None]) -> None:
        self._make = make
        self._order = order
        self._count = 0
        self._lock = threading.Lock()
        # Of caches that have ended, oldest first; finalizers append.
        self._kept: list[tuple[Size, CacheMemory]] = []

    def take(self, size: Size, number: Hashable = None) -> CacheMemory:
        """Memory, all zeros: that of the last cache of this size that has ended, or new.

        Args:
            number: that which it has on rank 0; None: the next one here.
        """
        with self._lock:
            found = self._find(size, number)
            if found is None:
                if number is None:
                    self._count += 1
                self._drop()
                return self._make(size, self._count if number is None else number)
        self._order()
        for tensor in found.tensors:
            tensor.zero_()
        return found

    def give(self, size: Size, memory: CacheMemory) -> None:
        """A cache has ended."""
        self._kept.append((size, memory))

    def forget(self) -> None:
        """Give all back that no cache uses."""
        self._kept.clear()

    def _find(self, size: Size, number: Hashable) -> CacheMemory | None:
        for at, (kept, memory) in reversed([*enumerate(self._kept)]):
            if kept == size and number in (None, memory.number):
                del self._kept[at]
                return memory
        return None

    def _drop(self) -> None:
        """The oldest go: what is kept must not be missing where another cache is made."""
        while sum(memory.nbytes for _, memory in self._kept) > _KEPT_BYTES:
            del self._kept[0]
