"""Which slots are taken and where their factors lie in the pool: bookkeeping alone, no tensors.

Sizes are those of the fullest rank, so every rank computes the same regions, the same victims and the same moves from
the same calls: nothing has to be agreed on but the calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Region:
    """A slot's room in the pool, in elements."""

    slot: int
    start: int
    size: int

    @property
    def stop(self) -> int:
        """First element after it."""
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class Move:
    """A slot's room that goes to another, always towards the front."""

    slot: int
    source: int
    target: int
    size: int


@dataclass(frozen=True, slots=True)
class Admission:
    """What has to be done to let newcomers in, in this order.

    Attributes:
        evicted: slots to free.
        moves: chunks to move, front first, when free room is in pieces.
        regions: one for each newcomer, in the order they were asked for.
    """

    evicted: Sequence[int]
    moves: Sequence[Move]
    regions: Sequence[Region]


class AdapterPool:
    """Slots and room of a pool.

    Args:
        num_slots: S, adapters that can be resident at once.
        capacity: elements of the pool.
    """

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.num_slots = num_slots
        self.capacity = capacity
        self._regions: dict[int, Region] = {}

    @property
    def slots(self) -> Sequence[int]:
        """Slots that are taken."""
        return tuple(self._regions)

    @property
    def used(self) -> int:
        """Elements that are taken."""
        return sum(region.size for region in self._regions.values())

    def plan(
        self, sizes: Sequence[int], candidates: Sequence[int] = (), leaving: Sequence[int] = ()
    ) -> Admission | None:
        """How to let in newcomers of ``sizes`` elements; None if there is no room even without all candidates.

        Args:
            sizes: elements of each newcomer.
            candidates: slots that may be freed, the first first; only as many as needed are.
            leaving: slots that are freed in any case, before the admission is done.
        """
        staying = {slot: region for slot, region in self._regions.items() if slot not in leaving}
        evicted = self._victims(staying, sizes, candidates)
        if evicted is None:
            return None
        kept = {slot: region for slot, region in staying.items() if slot not in evicted}
        slots = [slot for slot in range(self.num_slots) if slot not in kept][: len(sizes)]
        regions = _first_fit(list(kept.values()), slots, sizes, self.capacity)
        if regions is not None:
            return Admission(evicted, (), regions)
        moves, end = _compaction(list(kept.values()))
        regions = []
        for slot, size in zip(slots, sizes, strict=True):
            regions.append(Region(slot, end, size))
            end += size
        return Admission(evicted, moves, regions)

    def apply(self, admission: Admission) -> None:
        """Record that an admission was done."""
        for slot in admission.evicted:
            del self._regions[slot]
        for move in admission.moves:
            self._regions[move.slot] = Region(move.slot, move.target, move.size)
        for region in admission.regions:
            self._regions[region.slot] = region

    def free(self, slot: int) -> None:
        """Record that a slot was freed."""
        del self._regions[slot]

    def _victims(
        self, taken: Mapping[int, Region], sizes: Sequence[int], candidates: Sequence[int]
    ) -> Sequence[int] | None:
        slots = self.num_slots - len(taken) - len(sizes)
        room = self.capacity - sum(region.size for region in taken.values()) - sum(sizes)
        victims: list[int] = []
        for slot in candidates:
            if slots >= 0 and room >= 0:
                break
            victims.append(slot)
            slots, room = slots + 1, room + taken[slot].size
        if slots < 0 or room < 0:
            return None
        # A small one may have been chosen before a large one that alone makes the room.
        for slot in reversed(victims[:]):
            size = taken[slot].size
            if slots >= 1 and room >= size:
                victims.remove(slot)
                slots, room = slots - 1, room - size
        return victims


def _first_fit(taken: list[Region], slots: list[int], sizes: Sequence[int], capacity: int) -> list[Region] | None:
    """The first gap that holds each newcomer; None if one finds none."""
    placed: list[Region] = []
    for slot, size in zip(slots, sizes, strict=True):
        end, start = 0, None
        for region in sorted([*taken, *placed], key=lambda region: region.start):
            if region.start - end >= size:
                start = end
                break
            end = max(end, region.stop)
        if start is None and capacity - end >= size:
            start = end
        if start is None:
            return None
        placed.append(Region(slot, start, size))
    return placed


def _compaction(regions: list[Region]) -> tuple[list[Move], int]:
    """Moves of all regions to the front, and where free room then begins."""
    moves, end = [], 0
    for region in sorted(regions, key=lambda region: region.start):
        if region.start != end:
            moves.append(Move(region.slot, region.start, end, region.size))
        end += region.size
    return moves, end
