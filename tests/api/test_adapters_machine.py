"""Adapters loaded, changed, pinned, evicted, used and unloaded in any order, against a model of what must hold.

After every step: rows decode to the float64 reference of the contents they began with, references are those of the open
`use` blocks, and slots, room and tables hold exactly the resident adapters. 15 sequences of 25 calls on two ranks, the
same ones in each run; `make nightly` draws 200 new ones of 50 calls, on four ranks.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import bdlora_compile as bd
from bdlora_compile.runtime.adapter_version import AdapterInfo, Version
from bdlora_compile.runtime.ops import SlotField
from bdlora_compile.runtime.pending import Pending
from tests.api.conftest import Files
from tests.models import AdapterSpec, Reference, relative_error, save_adapter
from tests.runtime.late_copier import LateCopier

TOLERANCE = 2e-6
"""As in tests/numerics/test_compiled.py."""
NAMES = ("x", "y", "z", "w")
PROMPTS = torch.tensor([[5, 9, 33], [8, 8, 100], [90, 2, 7]])
SPECS = [
    AdapterSpec(rank=4, nblocks=2),
    AdapterSpec(rank=2),
    AdapterSpec(rank=4),
    AdapterSpec(rank=3, targets=("q_proj", "down_proj")),
    AdapterSpec(rank=3),
]
SLOTS = 4


@dataclass(frozen=True)
class World:
    """A compiled model on two ranks with four slots, contents on disk, and what each makes of each prompt."""

    model: Any
    paths: Sequence[Path]
    expected: Sequence[torch.Tensor]
    sizes: Sequence[int]

    def new_set(self) -> bd.AdapterSet:
        """Empty, whatever a machine that failed left behind."""
        self.model.bdlora._block.set(None)
        self.model.bdlora._num_choices = 0
        for rank in self.model.bdlora.ranks:
            for slot in list(rank.bank._sizes):
                rank.bank.clear(slot)
        # Rank 1 uploads as late as a device may.
        self.model.bdlora.ranks[1].bank._copier = LateCopier()
        return bd.AdapterSet(self.model.bdlora, SLOTS, None, host_bytes=2 * max(self.sizes))


@pytest.fixture(scope="module")
def world(files: Files, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> World:
    torch._dynamo.reset()
    folder = tmp_path_factory.mktemp("contents")
    paths = [save_adapter(spec, files.model, folder / f"c{seed}", seed) for seed, spec in enumerate(SPECS)]
    ranks = bd.Ranks.lockstep(4 if request.config.getoption("--nightly") else 2)
    model, adapters = bd.load(files.model, dtype=torch.float64, max_adapters=SLOTS, max_rank=4, ranks=ranks)
    sizes = [adapters.load("size", path).nbytes for path in paths]
    # Four slots, and room for two of the largest: both run out. Host memory for two: contents are read again.
    pool_bytes = 2 * max(sizes)
    model, _ = bd.load(
        files.model, dtype=torch.float64, max_adapters=SLOTS, max_rank=4, pool_bytes=pool_bytes, ranks=ranks
    )
    model.compile(backend="bdlora")
    reference = Reference(files.model, {f"c{index}": path for index, path in enumerate(paths)}, torch.float64)
    contents: list[str | None] = [*(f"c{index}" for index in range(len(paths))), None]
    expected = [reference.logits(PROMPTS, [name] * len(PROMPTS)) for name in contents]
    return World(model, paths, expected, sizes)


@dataclass(eq=False)
class Held:
    """What a name stands for: contents, and who holds it."""

    content: int
    references: int = 0
    pinned: bool = False


class Machine(RuleBasedStateMachine):
    """Calls in any order; `world` is set by the test."""

    world: World
    totals: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.adapters = self.world.new_set()
        self.names: dict[str, Held] = {}
        self.blocks: list[tuple[ExitStack, list[Held | None]]] = []
        self.pending: list[tuple[str, int, Pending[AdapterInfo]]] = []

    # --- what is done -----------------------------------------------------------------------------------------------

    @initialize(contents=st.lists(st.integers(0, len(SPECS) - 1), min_size=len(NAMES), max_size=len(NAMES)))
    def load_all(self, contents: list[int]) -> None:
        for name, content in zip(NAMES, contents, strict=True):
            self.load(name, content)

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, len(SPECS) - 1))
    def load(self, name: str, content: int) -> None:
        self.change(name, content, lambda: self.adapters.load(name, self.world.paths[content]))

    @precondition(lambda self: len(self.pending) < 3)
    @rule(name=st.sampled_from(NAMES), content=st.integers(0, len(SPECS) - 1))
    def begin_to_load(self, name: str, content: int) -> None:
        self.pending.append((name, content, self.adapters.begin_load(name, self.world.paths[content])))

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        """In any order, whatever happened since they were begun."""
        name, content, pending = self.pending.pop(data.draw(st.integers(0, len(self.pending) - 1)))
        self.change(name, content, pending.commit)

    def change(self, name: str, content: int, load: Callable[[], AdapterInfo]) -> None:
        """Load contents; a pinned name may find no room, and then nothing changes."""
        former = self.names.get(name)
        if former is not None and former.content == content:
            load()
            return
        held = Held(content, pinned=former is not None and former.pinned)
        locked = self.locked()
        if former in locked and former.references == 0:
            locked.discard(former)
        if held.pinned and not self.fits({held, *locked}):
            with pytest.raises(bd.AdapterError, match="taken by"):
                load()
            return
        load()
        self.names[name] = held

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.names)))
        self.adapters.unload(name)
        self.names.pop(name).pinned = False

    @rule(name=st.sampled_from(NAMES))
    def load_what_is_broken(self, name: str) -> None:
        before = self.adapters.stats()
        with pytest.raises(bd.AdapterError, match="nowhere"):
            self.adapters.load(name, self.world.paths[0] / "nowhere")
        assert self.adapters.stats() == before

    @rule(name=st.sampled_from(NAMES))
    def pin(self, name: str) -> None:
        held = self.names.get(name)
        if held is None:
            with pytest.raises(bd.AdapterError, match="no adapter of this name"):
                self.adapters.pin(name)
        elif self.fits({held, *self.locked()}):
            self.adapters.pin(name)
            held.pinned = True
        else:
            with pytest.raises(bd.AdapterError, match="taken by"):
                self.adapters.pin(name)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.names)))
        self.adapters.unpin(name)
        self.names[name].pinned = False

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.names)), min_size=1, max_size=3))
        if self.fits({*(self.names[name] for name in chosen), *self.locked()}):
            self.adapters.prefetch(chosen)
            assert all(self.adapters[name].is_resident for name in chosen)

    @precondition(lambda self: len(self.blocks) < 3)
    @rule(data=st.data())
    def open_a_block(self, data: st.DataObject) -> None:
        known = st.sampled_from([None, *sorted(self.names)])
        rows = data.draw(st.lists(known, min_size=len(PROMPTS), max_size=len(PROMPTS)))
        held = [None if name is None else self.names[name] for name in rows]
        stack = ExitStack()
        if not self.fits({*(one for one in held if one), *self.locked()}):
            # Nothing of it stays open, also where sabotage lets it in.
            with pytest.raises(bd.AdapterError, match="taken by"), stack:
                stack.enter_context(self.adapters.use(rows))
            return
        stack.enter_context(self.adapters.use(rows))
        self.blocks.append((stack, held))
        for one in {one for one in held if one}:
            one.references += 1

    @rule(data=st.data())
    def decode_rows(self, data: st.DataObject) -> None:
        """What happens most: rows come, run and go."""
        depth = len(self.blocks)
        self.open_a_block(data)
        self.decode()
        if len(self.blocks) > depth:
            self.close_a_block()

    @precondition(lambda self: self.blocks)
    @rule()
    def close_a_block(self) -> None:
        stack, held = self.blocks.pop()
        stack.close()
        for one in {one for one in held if one}:
            one.references -= 1

    @rule()
    def decode(self) -> None:
        held = self.blocks[-1][1] if self.blocks else [None] * len(PROMPTS)
        with torch.no_grad():
            found = self.world.model(PROMPTS).logits
        contents = [len(SPECS) if one is None else one.content for one in held]
        expected = torch.stack([self.world.expected[content][row] for row, content in enumerate(contents)])
        assert relative_error(found, expected) < TOLERANCE

    # --- what must hold ---------------------------------------------------------------------------------------------

    def alive(self) -> set[Held]:
        """Whatever a name stands for or a block holds."""
        return {*self.names.values(), *(one for _, held in self.blocks for one in held if one)}

    def locked(self) -> set[Held]:
        """What cannot leave."""
        return {one for one in self.alive() if one.references or one.pinned}

    def fits(self, held: set[Held]) -> bool:
        stats = self.adapters.stats()
        return len(held) <= stats.slots and sum(self.world.sizes[one.content] for one in held) <= stats.pool_bytes

    @invariant()
    def names_and_references_are_those_of_the_model(self) -> None:
        adapters = self.adapters
        assert set(adapters.names) == set(self.names)
        for name, held in self.names.items():
            info = adapters[name]
            assert (info.references, info.is_pinned) == (held.references, held.pinned)
            assert info.is_resident or not (held.references or held.pinned)
        assert adapters.stats().in_use == sum(one.references > 0 for one in self.alive())

    @invariant()
    def slots_and_room_are_those_of_the_residents(self) -> None:
        adapters, stats = self.adapters, self.adapters.stats()
        residents = {version.slot: version for version in adapters._tiers.residents.versions}
        assert len(residents) == stats.resident <= stats.slots
        element = adapters._tiers.element_size
        assert stats.pool_used_bytes == sum(version.elements for version in residents.values()) * element
        assert stats.pool_used_bytes <= stats.pool_bytes
        assert stats.host_used_bytes <= stats.host_bytes
        for rank in self.world.model.bdlora.ranks:
            taken = (rank.bank.slots[..., SlotField.A_RANK] > 0).any(dim=0)
            assert set(taken.nonzero().flatten().tolist()) | set(rank.bank._uploads) == set(residents)

    def teardown(self) -> None:
        while self.blocks:
            self.close_a_block()
        for name, content, pending in self.pending:
            self.change(name, content, pending.commit)
        for name in list(self.names):
            self.adapters.unload(name)
        stats = self.adapters.stats()
        for count in ("hits", "misses", "evictions", "compactions", "disk_reads"):
            self.totals[count] += getattr(stats, count)
        assert (stats.known, stats.resident, stats.in_use, stats.pinned, stats.in_host_memory) == (0, 0, 0, 0, 0)
        assert (stats.pool_used_bytes, stats.host_used_bytes) == (0, 0)
        assert all(not rank.bank.used_elements() for rank in self.world.model.bdlora.ranks)


def settings_of(examples: int, steps: int, *, shrink: bool = True, nightly: bool = False) -> settings:
    phases = [Phase.generate, *([Phase.shrink] if shrink else [])]
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=not nightly,  # the counts below are then the same in every run
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )


def test_any_order_of_calls(world: World, request: pytest.FixtureRequest) -> None:
    """And one graph was compiled in all."""
    nightly = request.config.getoption("--nightly")
    totals: Counter[str] = Counter()
    machine = type("AnyOrder", (Machine,), {"world": world, "totals": totals})
    run_state_machine_as_test(machine, settings=settings_of(200, 50, nightly=True) if nightly else settings_of(15, 25))
    assert len(bd.reports(world.model)) == 1
    assert min(totals.values()) >= 5, totals


def test_the_machine_notices_an_eviction_of_running_rows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: references do not protect."""
    monkeypatch.setattr(Version, "can_be_evicted", property(lambda self: self.slot is not None and not self.pinned))
    machine = type("Sabotaged", (Machine,), {"world": world, "totals": Counter()})
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_state_machine_as_test(machine, settings=settings_of(40, 25, shrink=False))
