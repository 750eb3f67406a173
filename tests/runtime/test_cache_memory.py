"""Caches that have ended leave their memory to later ones, and ranks come to the same by its numbers."""

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import bdlora_compile as bd
from bdlora_compile.runtime import cache_memory
from bdlora_compile.runtime.cache import CacheShape, LocalCache, new_memory
from bdlora_compile.runtime.cache_memory import CacheMemories, CacheMemory
from bdlora_compile.runtime.step_graphs import StepGraphs
from tests.api.conftest import Files, files  # noqa: F401  # a fixture

SHAPE = CacheShape(2, 1, 4, torch.float32, torch.device("cpu"), num_hosted=2)
SIZE = (2, 8)


def memories(told: list[str] | None = None) -> CacheMemories:
    """What it does in order."""
    log = [] if told is None else told
    return CacheMemories(lambda size, number: new_memory(SHAPE, size, number), lambda: log.append("order"))


def test_memory_is_that_of_the_last_cache_of_the_size() -> None:
    """Cleared behind the forwards before, which may still write it; another size has other memory and number."""
    told: list[str] = []
    own = memories(told)
    first = own.take(SIZE)
    for tensor in first.tensors:
        tensor.fill_(3)
    own.give(SIZE, first)
    other = own.take((2, 16))
    assert told == []
    assert other.number != first.number
    assert own.take(SIZE) is first
    assert told == ["order"]
    assert not any(bool(tensor.any()) for tensor in first.tensors)
    assert own.take(SIZE).number not in (first.number, other.number), "it is in use"


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_what_is_kept_is_not_missing_elsewhere(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_memory, "_KEPT_BYTES", kept)
    own = memories()
    first = own.take(SIZE)
    own.give(SIZE, first)
    own.take((2, 16))
    assert (own.take(SIZE) is first) is bool(kept)


class Rank:
    """Its memories, and its recorded forwards of them; ``leaks`` is sabotage: its caches do not end."""

    def __init__(self, *, leaks: bool = False) -> None:
        self.memories = memories()
        self.steps = StepGraphs(frozenset({0, 1}), frozenset({1}), lambda: lambda run: (lambda: None, run()))
        self._leaks = leaks
        self._leaked: list[CacheMemory] = []

    def request(self, number: Any = None) -> tuple[Any, list[str]]:
        """Makes a cache and decodes with it; returns its number, and how its forwards ran."""
        memory = self.memories.take(SIZE, number)
        ways = [self._forward(memory, seq) for seq in (7, 1, 1, 1)]
        if self._leaks:
            self._leaked.append(memory)
        else:
            self.memories.give(SIZE, memory)
        return memory.number, ways

    def _forward(self, memory: CacheMemory, seq: int) -> str:
        before = self.steps.stats.plain, self.steps.stats.recorded
        self.steps.run(True, (torch.zeros(1, seq), memory.store), lambda args: [torch.zeros(1)])
        if self.steps.stats.plain > before[0]:
            return "plain"
        return "recorded" if self.steps.stats.recorded > before[1] else "replayed"


def ways_of_two(follower: Rank) -> Sequence[tuple[list[str], list[str]]]:
    """Of five requests on rank 0, and on one that follows it and has an allocator of its own."""
    leading, found = Rank(), []
    for _ in range(5):
        number, ways = leading.request()
        found.append((ways, follower.request(("rank 0", number))[1]))
    return found


def test_ranks_record_and_replay_alike() -> None:
    """NCCL has it that collectives are recorded on all ranks or on none."""
    found = ways_of_two(Rank())
    assert all(leading == following for leading, following in found)
    assert found[0][0] == ["plain", "plain", "recorded", "replayed"]
    assert found[2][0] == ["replayed"] * 4
    assert any(leading != following for leading, following in ways_of_two(Rank(leaks=True)))


def test_the_caches_of_a_model_do_so(files: Files) -> None:  # noqa: F811
    """Also those that `generate` makes; what is not in use goes with the recorded graphs."""
    model, _ = bd.load(files.model, device="cpu")
    cache = bd.make_cache(model, *SIZE)
    number, place = cache.number, cache.store.data_ptr()
    del cache
    gc.collect()
    cache = model.new_cache(*SIZE)
    assert isinstance(cache, LocalCache)
    assert (cache.number, cache.store.data_ptr()) == (number, place)
    del cache
    gc.collect()
    bd.release_graphs(model)
    assert bd.make_cache(model, *SIZE).number != number
