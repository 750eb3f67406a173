"""One model on one mesh: everything that its graphs share at run time."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bdlora_compile.errors import ConfigError
from bdlora_compile.plan import ModelPlan
from bdlora_compile.report import Report
from bdlora_compile.runtime.agreement import Agreement
from bdlora_compile.runtime.all_reduce import AllReduce
from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.runtime.selection import BASE_ONLY, Selection
from bdlora_compile.runtime.store import ShardStore


@dataclass(frozen=True, slots=True)
class RankState:
    """What one rank holds: its slices of the weights, its adapter bank, and how it adds up with the others."""

    rank: int
    store: ShardStore
    bank: AdapterBank
    all_reduce: AllReduce


@dataclass(slots=True)
class Deployment:
    """A model's state in this process; every graph of the model reads it.

    Attributes:
        plan: placements and layouts, decided when the model was loaded.
        ranks: the ranks that this process hosts: one, or all of them in the lock-step interpreter.
        agreement: how the ranks compare notes.
        strict: whether a gather that nobody asked for is an error.
        selection: the slots that `AdapterSet.use` chose.
        reports: one for each graph compiled, oldest first.
        step: held by a forward while it is launched, and by whoever changes what slots hold: a change falls between
            two forwards.
        last_step: the last call of a program that records its decode steps (a `Launched`); who reads it takes it away.
    """

    plan: ModelPlan
    ranks: Sequence[RankState]
    agreement: Agreement
    strict: bool = True
    selection: Selection = BASE_ONLY
    reports: list[Report] = field(default_factory=list)
    step: threading.RLock = field(default_factory=threading.RLock)
    last_step: Any = None
    _written: tuple[Selection, int, int] | None = None
    _used: frozenset[int] = frozenset()

    @property
    def is_lockstep(self) -> bool:
        """Whether this process hosts more than one rank."""
        return len(self.ranks) > 1

    def select(self, batch: int, seq: int) -> bool:
        """Write the slot of each token of the coming forward into every hosted bank; ``step`` is held.

        Returns:
            Whether any token has an adapter.

        Raises:
            ConfigError: the selection was made for another batch, or the forward has too many tokens.
        """
        if self._written is None or self._written[0] is not self.selection or self._written[1:] != (batch, seq):
            self._write(batch, seq)
        for rank in self.ranks:
            rank.bank.before_step(self._used)
        return bool(self._used)

    def _write(self, batch: int, seq: int) -> None:
        slots = self.selection.by_token(batch, seq)
        for rank in self.ranks:
            buffer = rank.bank.token_slot
            if slots.numel() > buffer.numel():
                raise ConfigError(
                    "forward",
                    found=f"{slots.numel()} tokens",
                    expected=f"at most max_tokens={buffer.numel()}",
                    remedy="load the model with a larger max_tokens, or prefill in chunks",
                )
            buffer[: slots.numel()].copy_(slots)
        self._written = (self.selection, batch, seq)
        self._used = self.selection.used()
