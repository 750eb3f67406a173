"""The set of adapters that a model serves: which are known, which are resident, and which one each row or token uses.

Three tiers: the device's pool (`residents`), copies in host memory (`host_tier`), and the folders on disk. A name
stands for one version of contents at a time (`adapter_version`); `use` blocks hold references to versions, so that rows
finish on the contents they began with. Every decision (which slot, who is evicted, what is given up) is a function of
the calls alone, so ranks that make the same calls hold the same; loads and misses compare notes all the same.
"""

import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bdlora_compile.errors import AdapterError, BdloraError, UnknownAdapterError
from bdlora_compile.runtime.adapter_file import Adapter
from bdlora_compile.runtime.adapter_pool import Admission
from bdlora_compile.runtime.adapter_stats import AdapterStats, adapters_that_fit
from bdlora_compile.runtime.adapter_version import AdapterInfo, Version
from bdlora_compile.runtime.bank import StagedAdapter
from bdlora_compile.runtime.deployment import Deployment
from bdlora_compile.runtime.host_tier import HostTier
from bdlora_compile.runtime.leading import Leader, led
from bdlora_compile.runtime.pending import Pending, in_background
from bdlora_compile.runtime.residents import Residents
from bdlora_compile.runtime.selection import NO_ADAPTER, Names, Selection, choose
from bdlora_compile.runtime.staging import StagedContent, Stager, agree

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


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
        pool = deployment.ranks[0].bank.pool
        self._deployment = deployment
        self._stager = Stager(deployment, base_model)
        self._residents = Residents(deployment, num_slots)
        self._element_size = pool.element_size()
        self._host = HostTier(4 * pool.nbytes if host_bytes is None else host_bytes, self._element_size)
        self._current: dict[str, Version] = {}
        self._opened: dict[int, _Opened] = {}
        self._reading: dict[int, tuple[Future[Any], Callable[[], Any]]] = {}
        self._lock = threading.RLock()
        self._clock = 0
        self._fit = (
            adapters_that_fit(deployment.plan, pool.numel(), deployment.plan.max_rank, deployment.plan.mesh.size),
            adapters_that_fit(deployment.plan, pool.numel(), deployment.plan.max_rank) or 0,
        )
        self._hits = self._misses = self._disk_reads = 0
        self._stall_seconds = 0.0

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
        return tuple(self._current)

    def __contains__(self, name: object) -> bool:
        return name in self._current

    def __len__(self) -> int:
        return len(self._current)

    def __getitem__(self, name: str) -> AdapterInfo:
        with self._lock:
            return AdapterInfo.of(self._known(name), self._element_size)

    def version(self, name: str) -> str:
        """Digest of the adapter's contents: factors, and what of the configuration changes the mathematics.

        Equal on all ranks and in all processes; whatever is cached by adapter (a prefix cache) belongs to it, not to
        the name.
        """
        return self._known(name).digest

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
        return Pending(self._reading[number][0], lambda: self._finish(number))

    @led
    def _begin_load(self, name: str, path: str | Path) -> int:
        content = in_background(lambda: self._stage_named(name, Path(path)))
        return self._begin(content, lambda: self._settle(name, content.result))

    @led
    def unload(self, name: str) -> None:
        """Forget a name. Rows in a `use` block finish on it; its room is free after the last of them.

        Raises:
            AdapterError: there is no such adapter.
        """
        with self._lock:
            problem, version = self._find(name)
            self._agree(f"unload of adapter {name!r:.150}", problem, {"version": version.digest if version else ""})
            assert version is not None, "an unknown name is a problem"
            del self._current[name]
            self._retire(version)

    @led
    def pin(self, name: str) -> None:
        """Bring an adapter in and keep it resident until `unpin`; a name that is loaded again stays pinned.

        Raises:
            AdapterError: there is no such adapter, or no room for it.
        """
        with self._lock:
            version = self._known(name)
            self._bring_in([version], f"pin of adapter {name}")
            version.pinned = True

    @led
    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again."""
        with self._lock:
            self._known(name).pinned = False

    @led
    def prefetch(self, names: str | Sequence[str]) -> None:
        """Bring adapters in before they are used, as `use` would.

        Raises:
            AdapterError: a name is not known, or running rows and pinned adapters leave no room.
        """
        with self._lock:
            self._bring_in(self._all_known(names), "prefetch of adapters")

    def begin_prefetch(self, names: str | Sequence[str]) -> Pending[None]:
        """Start to read adapters of which host memory has no copy, in a thread; `Pending.commit` brings them in.

        Raises:
            AdapterError: a name is not known.
        """
        number = self._begin_prefetch(names)
        return Pending(self._reading[number][0], lambda: self._finish(number))

    @led
    def _begin_prefetch(self, names: str | Sequence[str]) -> int:
        with self._lock:
            missing = [one for one in self._all_known(names) if one.slot is None and one.staged is None]
        parts = in_background(lambda: {one: self._stager.stage_again(one) for one in missing})

        def settle() -> None:
            with self._lock:
                self._bring_in(self._all_known(names), "prefetch of adapters", parts.result)

        return self._begin(parts, settle)

    def _begin(self, reading: Future[Any], settle: Callable[[], Any]) -> int:
        with self._lock:
            self._clock += 1
            self._reading[self._clock] = (reading, settle)
            return self._clock

    @led
    def _finish(self, number: int) -> Any:
        """Commit what was begun under a number: the same one on all ranks, as they make the same calls."""
        return self._reading.pop(number)[1]()

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
            version = self._known(name)
            return version.slot is not None or self._residents.can_admit(version)

    def needs_reading(self, name: str) -> bool:
        """Whether neither the pool nor host memory has the adapter: `hold` would read files (see `begin_prefetch`)."""
        version = self._known(name)
        return version.slot is None and version.staged is None

    @led
    def _open(self, names: Names) -> _Opened:
        with self._lock:
            versions, choice = choose(names, self._known)
            self._count(versions)
            start = time.perf_counter()
            self._bring_in(versions, "use of adapters")
            self._stall_seconds += time.perf_counter() - start
            slots = torch.tensor([*(version.slot for version in versions), NO_ADAPTER], dtype=torch.int32)
            for version in versions:
                version.references += 1
            self._clock += 1
            # The base model's index is -1: the last of the table.
            opened = _Opened(self._clock, versions, Selection(slots[choice]))
            self._opened[opened.number] = opened
            return opened

    @led
    def _close(self, number: int) -> None:
        with self._lock:
            for version in self._opened.pop(number).versions:
                self._release(version)

    def stats(self) -> AdapterStats:
        """What the tiers hold and how they did."""
        with self._lock:
            pool, residents = self._residents.pool, self._residents.versions
            return AdapterStats(
                known=len(self._current),
                resident=len(residents),
                in_use=sum(version.references > 0 for version in residents),
                pinned=sum(version.pinned for version in residents),
                in_host_memory=len(self._host),
                slots=pool.num_slots,
                pool_bytes=pool.capacity * self._element_size,
                pool_used_bytes=pool.used * self._element_size,
                host_bytes=self._host.budget,
                host_used_bytes=self._host.used,
                hits=self._hits,
                misses=self._misses,
                evictions=self._residents.evictions,
                compactions=self._residents.compactions,
                disk_reads=self._disk_reads,
                stall_seconds=self._stall_seconds,
                block_diagonal_fit=self._fit[0],
                ordinary_fit=self._fit[1],
            )

    # --- loading ----------------------------------------------------------------------------------------------------

    def _load(self, name: str, source: Path | Adapter) -> AdapterInfo:
        return self._settle(name, lambda: self._stage_named(name, source))

    def _stage_named(self, name: str, source: Path | Adapter) -> StagedContent:
        _check_name(name)
        return self._stager.stage(source)

    def _settle(self, name: str, stage: Callable[[], StagedContent]) -> AdapterInfo:
        """Agree on what all ranks have staged, then change the set."""
        problem: BdloraError | None = None
        content: StagedContent | None = None
        try:
            content = stage()
        except BdloraError as error:
            problem = error
        with self._lock:
            facts = {"version": content.digest, "elements": content.elements} if content else {}
            answers = self._agree(f"load of adapter {name!r:.150}", problem, facts, equal=("version",))
            assert content is not None, "no rank has a problem"
            version = self._commit(name, content, max(int(str(answer["elements"])) for answer in answers))
            return AdapterInfo.of(version, self._element_size)

    def _commit(self, name: str, content: StagedContent, elements: int) -> Version:
        """Bring agreed contents into the set; what can fail here fails on every rank, before anything changes."""
        former = self._current.get(name)
        if former is not None and former.digest == content.digest:
            former.source = content.source
            return former
        pinned = former is not None and former.pinned
        version = Version(
            name, content.digest, content.rank, elements, content.notes, content.source, content.fingerprints, None
        )
        # The former contents leave for the new ones, unless rows still use them.
        leaving = former if former is not None and not former.references else None
        admission = self._first_admission(version, leaving, pinned)
        if former is not None:
            self._retire(former)
        self._current[name] = version
        self._host.keep(version, content.parts)
        self._touch(version)
        if admission is not None:
            self._residents.admit(admission, [version], {version: content.parts})
        version.pinned = pinned
        self._host.trim()
        return version

    def _first_admission(self, version: Version, leaving: Version | None, pinned: bool) -> Admission | None:
        if version.elements > self._residents.pool.capacity:
            raise AdapterError(
                f"adapter {version.name!r}",
                found=f"{version.elements} elements on the fullest rank",
                expected=f"at most the pool's {self._residents.pool.capacity}",
                remedy="load the model with a larger pool (max_adapters, max_rank or pool_bytes)",
            )
        admission = self._residents.spare(version, leaving)
        return self._residents.plan([version], leaving=leaving) if admission is None and pinned else admission

    def _bring_in(
        self,
        versions: Sequence[Version],
        topic: str,
        read: Callable[[], Mapping[Version, Sequence[StagedAdapter]]] = dict,
    ) -> None:
        """Make versions resident, all or none of them, on all ranks or on none; ``read`` are those read already."""
        for version in versions:
            self._touch(version)
        cold = [version for version in versions if version.slot is None]
        if not cold:
            return
        problem: BdloraError | None = None
        parts: dict[Version, Sequence[StagedAdapter]] = {}
        admission: Admission | None = None
        try:
            admission = self._residents.plan(cold, versions)
            ready = read()
            for version in cold:
                parts[version] = version.staged or ready.get(version) or self._stager.stage_again(version)
        except BdloraError as error:
            problem = error
        facts = {"in": [version.digest for version in cold], "out": list(admission.evicted) if admission else []}
        self._agree(topic, problem, facts, equal=("in", "out"))
        assert admission is not None, "no rank has a problem"
        self._disk_reads += sum(version.staged is None for version in cold)
        self._residents.admit(admission, cold, parts)
        for version in cold:
            self._host.keep(version, parts[version])
        self._host.trim()

    def _agree(
        self, topic: str, problem: BdloraError | None, facts: Mapping[str, object], equal: Collection[str] = ()
    ) -> Sequence[Mapping[str, object]]:
        return agree(self._deployment.agreement, topic, problem, facts, equal)

    def _retire(self, version: Version) -> None:
        """A name does not stand for this version any more: it goes with its last reference."""
        version.is_current = version.pinned = False
        self._drop_if_idle(version)

    def _release(self, version: Version) -> None:
        version.references -= 1
        self._drop_if_idle(version)

    def _drop_if_idle(self, version: Version) -> None:
        if not version.is_current and not version.references:
            self._residents.drop(version)
            self._host.forget(version)

    # --- names ------------------------------------------------------------------------------------------------------

    def _all_known(self, names: str | Sequence[str]) -> list[Version]:
        """The distinct versions of names, in their order."""
        return list(dict.fromkeys(self._known(name) for name in ([names] if isinstance(names, str) else names)))

    def _count(self, versions: Sequence[Version]) -> None:
        resident = sum(version.slot is not None for version in versions)
        self._hits += resident
        self._misses += len(versions) - resident

    def _touch(self, version: Version) -> None:
        self._clock += 1
        version.last_used = self._clock

    def _find(self, name: str) -> tuple[BdloraError | None, Version | None]:
        try:
            return None, self._known(name)
        except AdapterError as error:
            return error, None

    def _known(self, name: str) -> Version:
        if name in self._current:
            return self._current[name]
        known = ", ".join(list(self._current)[:10]) or "none"
        raise UnknownAdapterError(
            f"adapter {name!r:.60}",
            found="no adapter of this name",
            expected=f"one of the loaded adapters ({known}{', ...' if len(self._current) > 10 else ''})",
            remedy="load it with `adapters.load(name, path)`",
        )


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AdapterError(
            f"adapter name {name!r:.60}",
            found="characters or a length outside the pattern",
            expected=_NAME.pattern,
            remedy="choose a name of letters, digits, '.', '_' and '-'",
        )
