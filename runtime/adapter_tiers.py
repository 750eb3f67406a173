"""What names stand for, where contents are, and how both change: on all ranks or on none.

Contents are in up to three tiers: the device's pool (`residents`), copies in host memory (`host_tier`), and the folders
on disk. Each change has two phases. What can fail comes first (reading, checking, finding room), and the ranks agree on
it (`staging.agree`); then tables are written, which cannot fail. Every decision is a function of the calls alone, so
ranks that make the same calls hold the same; loads and misses compare notes all the same.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bdlora_compile.errors import AdapterError, BdloraError, UnknownAdapterError
from bdlora_compile.factors import Layout
from bdlora_compile.runtime.adapter_file import Adapter
from bdlora_compile.runtime.adapter_pool import Admission
from bdlora_compile.runtime.adapter_stats import AdapterStats, adapters_that_fit
from bdlora_compile.runtime.adapter_version import Version
from bdlora_compile.runtime.bank import StagedAdapter
from bdlora_compile.runtime.deployment import Deployment
from bdlora_compile.runtime.host_tier import HostTier
from bdlora_compile.runtime.residents import Residents
from bdlora_compile.runtime.staging import StagedContent, Stager, agree

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

Parts = Mapping[Version, Sequence[StagedAdapter]]
"""Contents in host memory, for each hosted rank."""


class Tiers:
    """The versions that names stand for and that rows still use.

    Calls come from one thread at a time, but for `stage` and `stage_again`.

    Args:
        deployment: the model's state.
        num_slots: adapters that can be resident at once.
        base_model: name or path of the served model, to be compared with the one an adapter names.
        host_bytes: budget for copies in host memory, of one rank; four times the pool by default.

    Attributes:
        current: what each name stands for, oldest name first.
        residents: the device's pool.
        host: copies in host memory.
        element_size: bytes of an element of the pool.
    """

    def __init__(
        self, deployment: Deployment, num_slots: int, base_model: str | None, host_bytes: int | None = None
    ) -> None:
        pool, plan = deployment.ranks[0].bank.pool, deployment.plan
        self._agreement = deployment.agreement
        self._stager = Stager(deployment, base_model)
        self.current: dict[str, Version] = {}
        self.residents = Residents(deployment, num_slots)
        self.element_size = pool.element_size()
        self.host = HostTier(4 * pool.nbytes if host_bytes is None else host_bytes, self.element_size)
        self._clock = 0
        takes_ordinary = plan.max_local_rank >= plan.max_rank or Layout.LOCAL not in plan.layouts.values()
        self._fit = (
            adapters_that_fit(plan, pool.numel(), plan.max_rank, plan.mesh.size),
            (adapters_that_fit(plan, pool.numel(), plan.max_rank) or 0) if takes_ordinary else 0,
        )
        self._hits = self._misses = self._disk_reads = 0
        self._stall_seconds = 0.0

    # --- names ------------------------------------------------------------------------------------------------------

    def known(self, name: str) -> Version:
        """What a name stands for.

        Raises:
            UnknownAdapterError: nothing.
        """
        if name in self.current:
            return self.current[name]
        raise self._unknown(name, "load it with `adapters.load(name, path)`")

    def _unknown(self, name: str, remedy: str) -> UnknownAdapterError:
        known = ", ".join(list(self.current)[:10]) or "none"
        return UnknownAdapterError(
            f"adapter {name!r:.60}",
            found="no adapter of this name",
            expected=f"one of the loaded adapters ({known}{', ...' if len(self.current) > 10 else ''})",
            remedy=remedy,
        )

    def all_known(self, names: str | Sequence[str]) -> list[Version]:
        """The distinct versions that names stand for, in their order.

        Raises:
            UnknownAdapterError: a name stands for nothing.
        """
        return list(dict.fromkeys(self.known(name) for name in ([names] if isinstance(names, str) else names)))

    # --- contents ---------------------------------------------------------------------------------------------------

    def stage(self, name: str, source: Path | Adapter) -> StagedContent:
        """Check a name, and read and check contents for it (`Stager.stage`); nothing changes."""
        _check_name(name)
        return self._stager.stage(source)

    def stage_again(self, versions: Sequence[Version]) -> Parts:
        """Read contents again of which there is no copy, see `Stager.stage_again`; nothing changes."""
        return {version: self._stager.stage_again(version) for version in versions}

    def put(self, name: str, content: StagedContent | None, problem: BdloraError | None) -> Version:
        """Let a name stand for contents that were staged, or say on all ranks what this rank's problem is.

        They become resident if nobody has to be evicted, or must if the name is pinned. The former contents stay as
        long as rows use them.

        Raises:
            AdapterError: a rank has a problem, or a pinned name finds no room.
            AgreementError: ranks have different contents, or one did not answer in time.
        """
        facts = {"version": content.digest, "elements": content.elements} if content else {}
        answers = agree(self._agreement, f"load of adapter {name!r:.150}", problem, facts, equal=("version",))
        assert content is not None, "no rank has a problem"
        elements = max(int(str(answer["elements"])) for answer in answers)
        former = self.current.get(name)
        if former is not None and former.digest == content.digest:
            former.source = content.source
            return former
        version = Version(
            name, content.digest, content.rank, elements, content.notes, content.source, content.fingerprints, None
        )
        # From here on what fails does so on every rank, before anything changes.
        admission = self._first_admission(version, former)
        if former is not None:
            version.pinned = former.pinned
            self._retire(former)
        self.current[name] = version
        self._touch(version)
        self.host.keep(version, content.parts)
        if admission is not None:
            self.residents.admit(admission, [version], {version: content.parts})
        self.host.trim()
        return version

    def remove(self, name: str) -> None:
        """Let a name stand for nothing; its contents go with the last row that uses them.

        Raises:
            UnknownAdapterError: it stands for nothing.
        """
        problem: BdloraError | None = None
        digest = ""
        if name in self.current:
            digest = self.current[name].digest
        else:
            # To load it first is no remedy for who wants it gone.
            problem = self._unknown(name, "name one of these" if self.current else "leave it out: nothing is loaded")
        agree(self._agreement, f"unload of adapter {name!r:.150}", problem, {"version": digest})
        self._retire(self.current.pop(name))

    def bring_in(self, versions: Sequence[Version], topic: str, read: Callable[[], Parts] = dict) -> None:
        """Make versions resident: all or none of them, on all ranks or on none.

        Args:
            versions: those that are needed together.
            topic: what is done, for messages.
            read: gives those that were read already.

        Raises:
            AdapterError: there is no room, or a rank cannot read contents again.
            AgreementError: ranks want different adapters, or one did not answer in time.
        """
        for version in versions:
            self._touch(version)
        cold = [version for version in versions if version.slot is None]
        if not cold:
            return
        problem: BdloraError | None = None
        parts: dict[Version, Sequence[StagedAdapter]] = {}
        admission: Admission | None = None
        try:
            admission = self.residents.plan(cold, versions)
            ready = read()
            for version in cold:
                parts[version] = version.staged or ready.get(version) or self._stager.stage_again(version)
        except BdloraError as error:
            problem = error
        facts = {"in": [version.digest for version in cold], "out": list(admission.evicted) if admission else []}
        agree(self._agreement, topic, problem, facts, equal=("in", "out"))
        assert admission is not None, "no rank has a problem"
        self._disk_reads += sum(version.staged is None for version in cold)
        self.residents.admit(admission, cold, parts)
        for version in cold:
            self.host.keep(version, parts[version])
        self.host.trim()

    def acquire(self, versions: Sequence[Version]) -> None:
        """Make versions resident, as `bring_in` does, and keep them so for a block that uses them.

        Raises:
            AdapterError, AgreementError: as for `bring_in`.
        """
        resident = sum(version.slot is not None for version in versions)
        self._hits += resident
        self._misses += len(versions) - resident
        start = time.perf_counter()
        self.bring_in(versions, "use of adapters")
        self._stall_seconds += time.perf_counter() - start
        for version in versions:
            version.references += 1

    def release(self, versions: Sequence[Version]) -> None:
        """The block ended."""
        for version in versions:
            version.references -= 1
            self._drop_if_idle(version)

    def stats(self) -> AdapterStats:
        """What the tiers hold and how they did."""
        pool, versions = self.residents.pool, self.residents.versions
        return AdapterStats(
            known=len(self.current),
            resident=len(versions),
            in_use=sum(version.references > 0 for version in versions),
            pinned=sum(version.pinned for version in versions),
            in_host_memory=len(self.host),
            slots=pool.num_slots,
            pool_bytes=pool.capacity * self.element_size,
            pool_used_bytes=pool.used * self.element_size,
            host_bytes=self.host.budget,
            host_used_bytes=self.host.used,
            hits=self._hits,
            misses=self._misses,
            evictions=self.residents.evictions,
            compactions=self.residents.compactions,
            disk_reads=self._disk_reads,
            stall_seconds=self._stall_seconds,
            block_diagonal_fit=self._fit[0],
            ordinary_fit=self._fit[1],
        )

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _first_admission(self, version: Version, former: Version | None) -> Admission | None:
        """How new contents of a name become resident; None if they need not and somebody would have to leave."""
        pool = self.residents.pool
        if version.elements > pool.capacity:
            raise AdapterError(
                f"adapter {version.name!r}",
                found=f"{version.elements} elements on the fullest rank",
                expected=f"at most the pool's {pool.capacity}",
                remedy="load the model with a larger pool (max_adapters, max_rank or pool_bytes)",
            )
        # The former contents leave for the new ones, unless rows still use them.
        leaving = former if former is not None and not former.references else None
        admission = self.residents.spare(version, leaving)
        if admission is None and former is not None and former.pinned:
            return self.residents.plan([version], leaving=leaving)
        return admission

    def _retire(self, version: Version) -> None:
        """A name does not stand for this version any more: it goes with its last reference."""
        version.is_current = version.pinned = False
        self._drop_if_idle(version)

    def _drop_if_idle(self, version: Version) -> None:
        if not version.is_current and not version.references:
            self.residents.drop(version)
            self.host.forget(version)

    def _touch(self, version: Version) -> None:
        self._clock += 1
        version.last_used = self._clock


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AdapterError(
            f"adapter name {name!r:.60}",
            found="characters or a length outside the pattern",
            expected=_NAME.pattern,
            remedy="choose a name of letters, digits, '.', '_' and '-'",
        )
