"""What `bench_decode` times and profiles: a column of its table, and a row's batch."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.decode.loops import DecodeLoop


@dataclass(frozen=True)
class Case:
    """A batch: rows, distinct adapters, tokens that each row holds."""

    batch: int
    adapters: int
    context: int


@dataclass(frozen=True)
class Column:
    """What batches are timed with, and profiled later.

    Attributes:
        strategy, adapters: what results call it.
        loop: runs its steps.
        files: the adapters that are resident then, by name; each row of a batch has one.
        adapter_bytes: of one of them.
    """

    strategy: str
    adapters: str
    loop: DecodeLoop
    files: Mapping[str, Path] = field(default_factory=dict)
    adapter_bytes: int = 0

    def load(self) -> float:
        """Make its adapters resident, if it has any; returns the seconds that it took."""
        return self.loop.load(self.files) if self.files else 0.0

    def chosen(self, case: Case) -> AbstractContextManager[None]:
        """A batch's adapters, inside a block."""
        names = [*self.files]
        return self.loop.chosen([names[row % case.adapters] for row in range(case.batch)] if names else [])

    @property
    def names(self) -> dict[str, str]:
        """In results."""
        return {"strategy": self.strategy, "kind_of_adapters": self.adapters}

    def line(self, case: Case) -> str:
        """The start of a row of a printed table."""
        return f"{self.strategy:<12} {self.adapters:<24} {case.batch:>3} {case.adapters:>3}"
