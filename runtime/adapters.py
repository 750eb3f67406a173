"""The set of adapters that a model serves, as its users see it: what they call, one call at a time.

A name stands for one version of contents at a time (`adapter_version`); `use` blocks hold references to versions, so
that rows finish on the contents they began with. Where contents are and how that changes: `adapter_tiers`.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from bdlora_compile.errors import BdloraError
from bdlora_compile.runtime.adapter_file import Adapter
from bdlora_compile.runtime.adapter_stats import AdapterStats
from bdlora_compile.runtime.adapter_tiers import Tiers
from bdlora_compile.runtime.adapter_version import AdapterInfo, Version
from bdlora_compile.runtime.deployment import Deployment
from bdlora_compile.runtime.leading import Leader, led
from bdlora_compile.runtime.pending import Pending, in_background
from bdlora_compile.runtime.selection import NO_ADAPTER, Names, Selection, choose
from bdlora_compile.runtime.staging import StagedContent

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Hold:
    """An adapter that stays in its slot, see `AdapterSet.hold`.

    Attributes:
        number: of the hold, the same on all ranks.
        version: digest of the contents.
        slot: where they are.
    """

    number: int
    version: str
    slot: int


@dataclass(frozen=True, slots=True)
class _Opened:
    """An open `use` block or a hold."""

    number: int
    versions: Sequence[Version]
    selection: Selection


class AdapterSet:
    """The adapters of one model, as `bdlora_compile.load` returns them.

    ``use`` chooses adapters for what runs inside it; the other methods change the set while serving, between two
    forwards and without compiling anything again. With several ranks every rank makes the same calls in the same order.

    Args:
        deployment: the model's state.
        num_slots: adapters that can be resident at once; any number can be known.
        base_model: name or path of the served model, to be compared with the one an adapter names.
        host_bytes: budget for copies in host memory, of one rank; four times the pool by default.
    """

    def __init__(
        self, deployment: Deployment, num_slots: int, base_model: str | None, host_bytes: int | None = None
    ) -> None:
        self._deployment = deployment
        self._tiers = Tiers(deployment, num_slots, base_model, host_bytes)
        self._opened: dict[int, _Opened] = {}
        self._reading: dict[int, tuple[Future[Any], Callable[[], Any]]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()

    @property
    def deployment(self) -> Deployment:
        """The model's state that this is a part of."""
        return self._deployment

    @property
    def leader(self) -> Leader | None:
        """See `runtime.leading`."""
        return self._deployment.leader

    @property
    def names(self) -> tuple[str, ...]:
        """Names that can be used, oldest first."""
        return tuple(self._tiers.current)

    def __contains__(self, name: object) -> bool:
        return name in self._tiers.current

    def __len__(self) -> int:
        return len(self._tiers.current)

    def __getitem__(self, name: str) -> AdapterInfo:
        with self._lock:
            return AdapterInfo.of(self._tiers.known(name), self._tiers.element_size)

    def version(self, name: str) -> str:
        """Digest of the adapter's contents: factors, and what of the configuration changes the mathematics.

        Equal on all ranks and in all processes; whatever is cached by adapter (a prefix cache) belongs to it, not to
        the name.
        """
        return self._tiers.known(name).digest

    # --- changing the set -------------------------------------------------------------------------------------------

    @led
    def load(self, name: str, path: str | Path) -> AdapterInfo:
        """Make an adapter from a PEFT folder known; nothing changes unless every rank has read and checked the same.

        It becomes resident if there is room without evicting anyone, or else when it is used. A name that is known
        stands for the new contents from now on; rows in a `use` block finish on the former ones. The same contents
        again change nothing.

        Raises:
            AdapterError: the name is malformed, the adapter cannot be served, on this rank or on another, or it is
                pinned and has no room.
            AgreementError: ranks found different contents, or one did not answer in time.
        """
        return self._load(name, Path(path))

    @led
    def add(self, name: str, adapter: Adapter) -> AdapterInfo:
        """Load an adapter that was read already; otherwise like `load`."""
        return self._load(name, adapter)

    def begin_load(self, name: str, path: str | Path) -> Pending[AdapterInfo]:
        """Start to read an adapter in a thread of its own, while the model serves; `Pending.commit` does the rest.

        Between two steps of a server, on all ranks, once rank 0 has seen ``pending.is_staged``: ``pending.commit()``.
        """
        number = self._begin_load(name, path)
        return self._pending(number)

    @led
    def _begin_load(self, name: str, path: str | Path) -> int:
        return self._begin(
            lambda: self._tiers.stage(name, Path(path)), lambda content: self._settle(name, content.result)
        )

    @led
    def unload(self, name: str) -> None:
        """Forget a name. Rows in a `use` block finish on it; its room is free after the last of them.

        Raises:
            AdapterError: there is no such adapter.
        """
        with self._lock:
            self._tiers.remove(name)

    @led
    def pin(self, name: str) -> None:
        """Bring an adapter in and keep it resident until `unpin`; a name that is loaded again stays pinned.

        Raises:
            AdapterError: there is no such adapter, or no room for it.
        """
        with self._lock:
            version = self._tiers.known(name)
            self._tiers.bring_in([version], f"pin of adapter {name}")
            version.pinned = True

    @led
    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again."""
        with self._lock:
            self._tiers.known(name).pinned = False

    @led
    def prefetch(self, names: str | Sequence[str]) -> None:
        """Bring adapters in before they are used, as `use` would.

        Raises:
            AdapterError: a name is not known, or running rows and pinned adapters leave no room.
        """
        with self._lock:
            self._tiers.bring_in(self._tiers.all_known(names), "prefetch of adapters")

    def begin_prefetch(self, names: str | Sequence[str]) -> Pending[None]:
        """Start to read adapters of which host memory has no copy, in a thread; `Pending.commit` brings them in.

        Raises:
            AdapterError: a name is not known.
        """
        number = self._begin_prefetch(names)
        return self._pending(number)

    @led
    def _begin_prefetch(self, names: str | Sequence[str]) -> int:
        with self._lock:
            missing = [one for one in self._tiers.all_known(names) if one.slot is None and one.staged is None]

        def settle(parts: Future[Any]) -> None:
            with self._lock:
                self._tiers.bring_in(self._tiers.all_known(names), "prefetch of adapters", parts.result)

        return self._begin(lambda: self._tiers.stage_again(missing), settle)

    # --- choosing ---------------------------------------------------------------------------------------------------

    @contextmanager
    def use(self, names: Names) -> Iterator[None]:
        """Choose adapters for the forwards inside the block; those that are not resident are brought in first.

        Args:
            names: one name or None for all rows; a sequence with one for each row of the batch; or one sequence a row
                with one for each token of a single forward. None is the base model.

        Raises:
            AdapterError: a name is not known, or running rows and pinned adapters leave no room.
            ConfigError: rows of names differ in length.
        """
        opened = self._open(names)
        try:
            with self._deployment.chosen_by_user(opened.selection):
                yield
        finally:
            self._close(opened.number)

    def hold(self, name: str) -> Hold:
        """Bring an adapter in and keep its contents of now in their slot until `release`, as an open `use` block does.

        For schedulers that make up batches of their own: a row's adapter is held as long as the row runs.

        Raises:
            AdapterError: the name is not known, or running rows and pinned adapters leave no room (see `has_room`).
        """
        opened = self._open(name)
        return Hold(opened.number, opened.versions[0].digest, int(opened.selection.slots))

    def release(self, hold: Hold) -> None:
        """Let go what `hold` gave."""
        self._close(hold.number)

    def has_room(self, name: str) -> bool:
        """Whether `hold` would find room now; if not, it will once rows finish.

        Raises:
            AdapterError: the name is not known, or pinned adapters leave no room whoever finishes.
        """
        with self._lock:
            version = self._tiers.known(name)
            return version.slot is not None or self._tiers.residents.can_admit(version)

    def needs_reading(self, name: str) -> bool:
        """Whether neither the pool nor host memory has the adapter: `hold` would read files (see `begin_prefetch`)."""
        version = self._tiers.known(name)
        return version.slot is None and version.staged is None

    @led
    def _open(self, names: Names) -> _Opened:
        with self._lock:
            versions, choice = choose(names, self._tiers.known)
            self._tiers.acquire(versions)
            slots = torch.tensor([*(version.slot for version in versions), NO_ADAPTER], dtype=torch.int32)
            # The base model's index is -1: the last of the table.
            opened = _Opened(next(self._numbers), versions, Selection(slots[choice]))
            self._opened[opened.number] = opened
            return opened

    @led
    def _close(self, number: int) -> None:
        with self._lock:
            self._tiers.release(self._opened.pop(number).versions)

    def stats(self) -> AdapterStats:
        """What the tiers hold and how they did."""
        with self._lock:
            return self._tiers.stats()

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _load(self, name: str, source: Path | Adapter) -> AdapterInfo:
        # Other calls may run while it is read.
        return self._settle(name, lambda: self._tiers.stage(name, source))

    def _settle(self, name: str, stage: Callable[[], StagedContent]) -> AdapterInfo:
        """Change the set to what was staged on all ranks, or say on all of them what is the matter on one."""
        problem: BdloraError | None = None
        content: StagedContent | None = None
        try:
            content = stage()
        except BdloraError as error:
            problem = error
        with self._lock:
            return AdapterInfo.of(self._tiers.put(name, content, problem), self._tiers.element_size)

    def _begin(self, read: Callable[[], _T], settle: Callable[[Future[_T]], Any]) -> int:
        with self._lock:
            number = next(self._numbers)
        # Rank 0 asks before it commits: the disk of another one must not stall its steps.
        reading = in_background(read, lambda: self._deployment.agreement.announce(_read(number)))
        with self._lock:
            self._reading[number] = (reading, lambda: settle(reading))
        return number

    def _pending(self, number: int) -> Pending[Any]:
        agreement = self._deployment.agreement
        return Pending(
            self._reading[number][0],
            lambda: agreement.all_announced(_read(number)),
            lambda: self._finish(number),
        )

    @led
    def _finish(self, number: int) -> Any:
        """Commit what was begun under a number: the same one on all ranks, as they make the same calls."""
        try:
            return self._reading.pop(number)[1]()
        finally:
            self._deployment.agreement.retract(_read(number))


def _read(number: int) -> str:
    """What a rank announces when it has read what was begun under a number."""
    return f"read/{number}"
