"""One model on one mesh: everything that its graphs share at run time."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakSet

from bdlora_compile.errors import ConfigError
from bdlora_compile.plan import ModelPlan
from bdlora_compile.report import Report
from bdlora_compile.runtime.agreement import Agreement
from bdlora_compile.runtime.all_reduce import AllReduce
from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.runtime.leading import Leader
from bdlora_compile.runtime.selection import BASE_ONLY, Selection
from bdlora_compile.runtime.step_graphs import StepGraphs
from bdlora_compile.runtime.step_watch import StepWatch
from bdlora_compile.runtime.store import ShardStore
from bdlora_compile.stand_ins import StandIns


@dataclass(frozen=True, slots=True)
class RankState:
    """What one rank holds: its slices of the weights, its adapter bank, and how it adds up with the others."""

    rank: int
    store: ShardStore
    bank: AdapterBank
    all_reduce: AllReduce


@dataclass(slots=True, eq=False)
class _Block:
    """What forwards use inside a block, in its own thread or task and in those that are started there.

    Attributes:
        outer: the block that it lies in.
        is_open: whether it has not ended: only then the slots are those of its adapters.
    """

    selection: Selection
    outer: "_Block | None"
    is_open: bool = True

    def end(self) -> "_Block | None":
        """Returns: the innermost block around it that has not ended."""
        self.is_open = False
        found = self.outer
        while found is not None and not found.is_open:
            found = found.outer
        return found


@dataclass(slots=True)
class Deployment:
    """A model's state in this process; every graph of the model reads it.

    Attributes:
        plan: placements and layouts, decided when the model was loaded.
        ranks: the ranks that this process hosts: one, or all of them in the lock-step interpreter.
        agreement: how the ranks compare notes.
        strict: whether a gather that nobody asked for is an error.
        reports: one for each graph compiled, oldest first.
        step_graphs: of the programs that record forwards, as long as they live.
        step: held by a forward while it is launched, and by whoever changes what slots hold: a change falls between
            two forwards.
        last_step: the last call of a program that records its decode steps (a `Launched`); who reads it takes it away.
        leader: on rank 0, while the other ranks follow its calls.
        stand_ins: which layers Dynamo traces; None where it traces every layer, as in a model
            whose sites are not in one list of layers.
        watch: notices forwards that never end; None where the transport does so itself, or there is one rank.
    """

    plan: ModelPlan
    ranks: Sequence[RankState]
    agreement: Agreement
    strict: bool = True
    reports: list[Report] = field(default_factory=list)
    step_graphs: WeakSet[StepGraphs] = field(default_factory=WeakSet)
    step: threading.RLock = field(default_factory=threading.RLock)
    leader: Leader | None = None
    watch: StepWatch | None = None
    stand_ins: StandIns | None = None
    # Each thread, and each task of an event loop, has its own choice.
    _block: ContextVar[_Block | None] = field(default_factory=lambda: ContextVar("bdlora_block", default=None))
    _num_choices: int = 0
    last_step: Any = None
    _written: tuple[Selection, int, int] | None = None
    _used: frozenset[int] = frozenset()

    @property
    def is_lockstep(self) -> bool:
        """Whether this process hosts more than one rank."""
        return len(self.ranks) > 1

    @property
    def selection(self) -> Selection:
        """The slots that this thread's forwards use: those of its innermost `AdapterSet.use`.

        Raises:
            ConfigError: this thread chose nothing while another has a `use` block open: which of both the caller
                means cannot be known. Or its block has ended, and its slots may be others' by now.
        """
        own = self._block.get()
        if own is not None and not own.is_open:
            raise ConfigError(
                "forward",
                found="a task or thread that was started inside an `adapters.use` block, which has ended since",
                expected="a block that is open as long as forwards use it",
                remedy="enter `adapters.use(...)` in the task itself",
            )
        if own is None and self._num_choices:
            raise ConfigError(
                "forward",
                found="no `adapters.use` block in this thread, while other threads have one open",
                expected="a choice of adapters in the thread that runs the model",
                remedy="enter `adapters.use(...)` in this thread; `adapters.use(None)` is the base model",
            )
        return BASE_ONLY if own is None else own.selection

    @contextmanager
    def chosen(self, selection: Selection) -> Iterator[None]:
        """Let this thread's forwards use ``selection`` inside the block.

        Raises:
            ConfigError: a block that was entered later is open still: forwards used that one's.
        """
        own = _Block(selection, self._block.get())
        self._block.set(own)
        try:
            yield
        finally:
            outer, current = own.end(), self._block.get()
            # What ends a generator may be another task, in which nothing of it is set.
            if current is own:
                self._block.set(outer)
            elif current is not None and current.is_open:
                raise ConfigError(
                    "adapters.use",
                    found="a block that ends before one that was entered inside of it, as in generators read in turn",
                    expected="each to end before the one that it lies in: forwards since had the later one's adapters",
                    remedy="enter a block around each forward, not around a `yield`",
                )

    @contextmanager
    def chosen_by_user(self, selection: Selection) -> Iterator[None]:
        """The same for a `use` block: meanwhile a thread that chose nothing is refused, see `selection`."""
        with self.step:
            self._num_choices += 1
        try:
            with self.chosen(selection):
                yield
        finally:
            with self.step:
                self._num_choices -= 1

    def repeat_rows(self, repeats: int) -> None:
        """Every row of this thread's batch became ``repeats`` rows."""
        block = self._block.get()
        if block is not None:
            block.selection = replace(block.selection, repeats=block.selection.repeats * repeats)

    def select(self, batch: int, seq: int) -> bool:
        """Write the slot of each token of the coming forward into every hosted bank; ``step`` is held.

        Returns:
            Whether any token has an adapter.

        Raises:
            ConfigError: the selection was made for another batch, or the forward has too many tokens.
        """
        selection = self.selection
        is_written = self._written is not None and self._written[0] is selection and self._written[1:] == (batch, seq)
        used = self._used if is_written else selection.used()
        # Before anything is written, which a forward on another stream may still read.
        for rank in self.ranks:
            rank.bank.before_step(used)
        if not is_written:
            self._write(selection, batch, seq)
            self._used = used
        return bool(used)

    def follow_forwards(self) -> None:
        """Let what is launched next on the current stream run behind all forwards that were launched."""
        with self.step:
            for rank in self.ranks:
                rank.bank.before_step(())

    def _write(self, selection: Selection, batch: int, seq: int) -> None:
        slots = selection.by_token(batch, seq)
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
        self._written = (selection, batch, seq)
