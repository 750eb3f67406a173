"""Slots and room of the pool: no two adapters overlap, nobody is evicted without need, and pieces are joined."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from bdlora_compile.runtime.adapter_pool import AdapterPool, Admission, Move, Region


def test_room_in_pieces_is_joined() -> None:
    """Two gaps of one; the newcomer needs both, and the one between them moves to the front."""
    pool = AdapterPool(4, 48)
    for _ in range(3):
        admission = pool.plan([16])
        assert admission is not None
        pool.apply(admission)
    pool.free(0)
    pool.free(2)
    assert pool.plan([32]) == Admission([], [Move(1, 16, 0, 16)], [Region(0, 16, 32)])


def test_the_first_candidates_go_first() -> None:
    pool = AdapterPool(2, 64)
    pool.apply(_sure(pool.plan([16, 16])))
    assert _sure(pool.plan([16], candidates=[1, 0])).evicted == [1]
    assert _sure(pool.plan([16], candidates=[0, 1])).evicted == [0]


def test_a_small_one_stays_if_a_large_one_makes_the_room() -> None:
    """The first candidate alone is too small, and not needed once the second goes."""
    pool = AdapterPool(8, 64)
    pool.apply(_sure(pool.plan([16, 48])))
    assert _sure(pool.plan([48], candidates=[0, 1])).evicted == [1]
    assert _sure(pool.plan([64], candidates=[0, 1])).evicted == [0, 1]


def test_no_room_without_the_candidates() -> None:
    pool = AdapterPool(2, 64)
    pool.apply(_sure(pool.plan([16, 48])))
    assert pool.plan([16]) is None
    assert pool.plan([64], candidates=[1]) is None
    assert pool.plan([64], leaving=[0, 1]) is not None


def _sure(admission: Admission | None) -> Admission:
    assert admission is not None
    return admission


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_history_leaves_disjoint_regions(data: st.DataObject) -> None:
    """Against a plain model of the memory: every element belongs to one adapter, and moves keep the contents."""
    num_slots, capacity = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    pool, memory = AdapterPool(num_slots, capacity), [""] * capacity
    holders: dict[int, tuple[str, Region]] = {}
    for step in range(data.draw(st.integers(1, 12))):
        frees: bool = data.draw(st.booleans())
        if holders and frees:
            slot = data.draw(st.sampled_from(sorted(holders)))
            pool.free(slot)
            del holders[slot]
        sizes = data.draw(st.lists(st.integers(0, capacity), min_size=1, max_size=3))
        candidates = data.draw(st.permutations(sorted(holders)))
        admission = pool.plan(sizes, candidates)
        if admission is None:
            too_large = sum(sizes) > capacity or len(sizes) > num_slots
            assert too_large, "all residents are candidates: only the sizes can be in the way"
            continue
        _check_needed(pool, sizes, admission)
        pool.apply(admission)
        for slot in admission.evicted:
            del holders[slot]
        for move in admission.moves:
            assert move.target < move.source
            memory[move.target : move.target + move.size] = memory[move.source : move.source + move.size]
            holders[move.slot] = (holders[move.slot][0], Region(move.slot, move.target, move.size))
        for index, region in enumerate(admission.regions):
            assert region.slot not in holders
            assert region.stop <= capacity
            name = f"{step}.{index}"
            memory[region.start : region.stop] = [name] * region.size
            holders[region.slot] = (name, region)
        for name, region in holders.values():
            assert memory[region.start : region.stop] == [name] * region.size
        assert sorted(pool.slots) == sorted(holders)
        assert pool.used == sum(region.size for _, region in holders.values())


def _check_needed(pool: AdapterPool, sizes: Sequence[int], admission: Admission) -> None:
    """With one victim fewer there is no room."""
    for spared in admission.evicted:
        others = [slot for slot in admission.evicted if slot != spared]
        assert pool.plan(sizes, others) is None
