"""Copies of adapters in host memory, the ones used last: bringing one to the device from here needs no disk."""

from collections.abc import Sequence

from bdlora_compile.runtime.adapter_version import Version
from bdlora_compile.runtime.bank import StagedAdapter


class HostTier:
    """Keeps staged copies within a budget, the least recently used given up first.

    Sizes are the agreed ones, so that every rank keeps the same.

    Args:
        budget: bytes of one rank's copies.
        element_size: bytes of an element of the pool.
    """

    def __init__(self, budget: int, element_size: int) -> None:
        self.budget = budget
        self._element_size = element_size
        self._kept: dict[Version, int] = {}

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return sum(self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, version: Version, parts: Sequence[StagedAdapter]) -> None:
        """Keep a copy; `trim` may give it up."""
        version.staged = parts
        self._kept[version] = version.elements * self._element_size

    def forget(self, version: Version) -> None:
        """Give up a copy, if there is one."""
        version.staged = None
        self._kept.pop(version, None)

    def trim(self) -> None:
        """Give up the copies used longest ago until the budget holds."""
        for version in sorted(self._kept, key=lambda version: version.last_used):
            if self.used <= self.budget:
                return
            self.forget(version)
