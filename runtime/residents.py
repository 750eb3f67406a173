"""The adapters that are in the device's pool: who may come in, who has to leave, and doing it between two forwards."""

from collections.abc import Collection, Mapping, Sequence

from bdlora_compile.errors import AdapterError
from bdlora_compile.runtime.adapter_pool import AdapterPool, Admission
from bdlora_compile.runtime.adapter_version import Version
from bdlora_compile.runtime.bank import StagedAdapter
from bdlora_compile.runtime.deployment import Deployment


class Residents:
    """Versions in slots, the same ones in the same slots on every rank.

    Args:
        deployment: the model's state, whose banks are written.
        num_slots: S, versions that can be resident at once.
    """

    def __init__(self, deployment: Deployment, num_slots: int) -> None:
        self._deployment = deployment
        self._pool = AdapterPool(num_slots, deployment.ranks[0].bank.pool.numel())
        self._by_slot: dict[int, Version] = {}
        self.evictions = 0
        self.compactions = 0

    @property
    def versions(self) -> Collection[Version]:
        """All that are resident."""
        return self._by_slot.values()

    @property
    def pool(self) -> AdapterPool:
        """The bookkeeping, to be read."""
        return self._pool

    def plan(
        self, wanted: Sequence[Version], needed: Collection[Version] = (), leaving: Version | None = None
    ) -> Admission:
        """How to make ``wanted`` resident, evicting the least recently used that nobody needs.

        Args:
            wanted: versions that are not resident.
            needed: resident ones that must stay as well.
            leaving: one that is dropped before.

        Raises:
            AdapterError: slots or room are taken by adapters with open `use` blocks or by pinned ones.
        """
        candidates = [version for version in self.versions if version.can_be_evicted and version not in needed]
        candidates.sort(key=lambda version: version.last_used)
        slots = [slot for version in candidates for slot in _slots(version) if version is not leaving]
        admission = self._pool.plan([version.elements for version in wanted], slots, _slots(leaving))
        if admission is None:
            raise self._taken(wanted, needed)
        return admission

    def spare(self, version: Version, leaving: Version | None = None) -> Admission | None:
        """How to make ``version`` resident without evicting anyone, None if there is no room."""
        return self._pool.plan([version.elements], leaving=_slots(leaving))

    def can_admit(self, version: Version) -> bool:
        """Whether a version finds room now, or only once running rows finish.

        Raises:
            AdapterError: it would find none even then: pinned adapters have taken it.
        """
        unpinned = [slot for one in self.versions if not one.pinned for slot in _slots(one)]
        if self._pool.plan([version.elements], unpinned) is None:
            raise self._taken([version], ())
        idle = [slot for one in self.versions if one.can_be_evicted for slot in _slots(one)]
        return self._pool.plan([version.elements], idle) is not None

    def admit(
        self, admission: Admission, wanted: Sequence[Version], parts: Mapping[Version, Sequence[StagedAdapter]]
    ) -> None:
        """Do what was planned; the newcomers are copied beside the forwards that follow."""
        with self._deployment.step:
            for slot in admission.evicted:
                self._by_slot.pop(slot).slot = None
            for index, rank in enumerate(self._deployment.ranks):
                for slot in admission.evicted:
                    rank.bank.clear(slot)
                rank.bank.move(admission.moves)
                for version, region in zip(wanted, admission.regions, strict=True):
                    rank.bank.write(region.slot, parts[version][index], region.start)
            for version, region in zip(wanted, admission.regions, strict=True):
                version.slot = region.slot
                self._by_slot[region.slot] = version
            self._pool.apply(admission)
        self.evictions += len(admission.evicted)
        self.compactions += bool(admission.moves)

    def drop(self, version: Version) -> None:
        """Free the slot of a version, if it has one."""
        if version.slot is None:
            return
        with self._deployment.step:
            for rank in self._deployment.ranks:
                rank.bank.clear(version.slot)
            self._pool.free(version.slot)
            del self._by_slot[version.slot]
            version.slot = None

    def _taken(self, wanted: Sequence[Version], needed: Collection[Version]) -> AdapterError:
        running = [version for version in self.versions if version.references]
        pinned = [version for version in self.versions if version.pinned and not version.references]
        pool, size = self._pool, sum(version.elements for version in wanted)
        return AdapterError(
            f"adapters {', '.join(repr(version.name) for version in wanted[:5])}{', ...' if wanted[5:] else ''}",
            found=f"a pool of {pool.num_slots} slots and {pool.capacity} elements taken by {len(running)} adapters of "
            f"running rows, {len(pinned)} pinned ones and {len(set(needed) - set(wanted))} of the same call",
            expected=f"{len(wanted)} slots and {size} elements for them",
            remedy="wait for rows to finish, unpin an adapter, use fewer adapters at once, or load the model with a "
            "larger max_adapters or pool",
        )


def _slots(version: Version | None) -> Sequence[int]:
    return [] if version is None or version.slot is None else [version.slot]
