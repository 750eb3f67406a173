"""Two ranks that compare notes through a store, as threads of this process: all of them change, or none does."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._C._distributed_c10d import HashStore

import bdlora_compile as bd
from bdlora_compile.placement import Mesh
from bdlora_compile.runtime.agreement import StoreAgreement
from tests.api.conftest import Files
from tests.models import AdapterSpec, save_adapter

LIMIT = timedelta(seconds=2)

Call = Callable[[bd.AdapterSet, int], object]


@dataclass(frozen=True)
class Pair:
    """The adapter sets of two ranks with room for two adapters each, and each rank's own copies of four adapters."""

    sets: Sequence[bd.AdapterSet]
    paths: Sequence[dict[str, Path]]
    pool: ThreadPoolExecutor

    def both(self, call: Call) -> list[str]:
        """What a call of both ranks at once comes to: "" or the error."""
        return list(self.pool.map(lambda rank: self.one(call, rank), (0, 1)))

    def one(self, call: Call, rank: int) -> str:
        try:
            call(self.sets[rank], rank)
        except bd.BdloraError as error:
            return str(error)
        return ""

    def load(self, *names: str) -> None:
        for name in names:
            assert self.both(lambda own, rank, name=name: own.load(name, self.paths[rank][name])) == ["", ""]  # type: ignore[misc]

    def state(self) -> list[object]:
        """What each rank holds: what is known and resident, its slot table, and every element of its pool."""
        found: list[object] = []
        for own in self.sets:
            infos = [own[name] for name in own.names]
            bank = own._deployment.ranks[0].bank
            found.append(
                (
                    [(info.name, info.version, info.is_resident) for info in infos],
                    bank.slots.tolist(),
                    bank.pool.tolist(),
                )
            )
        return found

    def known_and_resident(self) -> list[tuple[str, bool]]:
        """Of rank 0, after a check that rank 1 holds the same."""
        first, second = ([(name, own[name].version, own[name].is_resident) for name in own.names] for own in self.sets)
        assert first == second
        return [(name, resident) for name, _, resident in first]


@pytest.fixture(scope="module")
def masters(files: Files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("masters")
    names = ("a0", "a1", "a2", "a3")
    return {
        name: save_adapter(AdapterSpec(rank=4, nblocks=2), files.model, folder / name, seed)
        for seed, name in enumerate(names)
    }


@pytest.fixture
def pair(files: Files, masters: dict[str, Path], tmp_path: Path) -> Iterator[Pair]:
    store = HashStore()
    sets, paths = [], []
    for rank in range(2):
        ranks = bd.Ranks(Mesh(2, "threads"), [rank], StoreAgreement(store, rank, 2, LIMIT))
        # One after the other: they must not compare notes while they are loaded, as they do on how to add up.
        _, adapters = bd.load(files.model, max_adapters=2, max_rank=4, all_reduce="nccl", ranks=ranks)
        sets.append(adapters)
        paths.append({name: shutil.copytree(path, tmp_path / f"{rank}" / name) for name, path in masters.items()})
    with ThreadPoolExecutor(2) as pool:
        yield Pair(sets, paths, pool)


def cut(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])


def change(folder: Path) -> None:
    """One value, of one tensor: far from what each rank's own slices need."""
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    sorted(tensors.items())[5][1].view(-1)[-1] += 1
    save_file(tensors, weights)


def spoil(folder: Path) -> None:
    """Not a number, in what either rank holds."""
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    tensors[name][:, -1] = torch.nan
    save_file(tensors, weights)


def spoil_the_end(folder: Path) -> None:
    """Not a number, in what rank 1 holds alone."""
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    tensors[name][-1, -1] = torch.nan
    save_file(tensors, weights)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("damage", "own", "others"),
    [
        (cut, "no valid safetensors", "load of adapter 'a1' on rank {}: found"),
        (shutil.rmtree, "found nothing", "load of adapter 'a1' on rank {}: found"),
        (change, "on rank 1: found version", "on rank 1: found version"),
        (spoil, "NaN or infinite", "load of adapter 'a1' on rank {}: found"),
    ],
    ids=["truncated", "missing", "different", "not finite"],
)
def test_a_load_that_one_rank_cannot_do_is_done_by_none(
    pair: Pair, damage: Callable[[Path], None], own: str, others: str, rank: int
) -> None:
    """Each rank's error names the rank that is in the way; what was loaded before is untouched; then it works."""
    pair.load("a0")
    before = pair.state()
    damage(pair.paths[rank]["a1"])
    errors = pair.both(lambda adapters, at: adapters.load("a1", pair.paths[at]["a1"]))
    assert own in errors[rank]
    assert others.format(rank) in errors[1 - rank]
    assert pair.state() == before
    pair.paths[rank]["a1"] = pair.paths[1 - rank]["a1"]
    pair.load("a1")
    assert pair.known_and_resident() == [("a0", True), ("a1", True)]


def test_a_value_that_one_rank_alone_copies_stops_all(pair: Pair) -> None:
    """A rank looks at what it holds itself; both have the same file, and nobody misses the value."""
    pair.load("a0")
    before = pair.state()
    for rank in (0, 1):
        spoil_the_end(pair.paths[rank]["a1"])
    errors = pair.both(lambda adapters, at: adapters.load("a1", pair.paths[at]["a1"]))
    assert "q_proj.lora_B.weight" in errors[1]
    assert "1 values that are NaN or infinite" in errors[1]
    assert "load of adapter 'a1' on rank 1: found" in errors[0]
    assert pair.state() == before


@pytest.mark.parametrize("rank", [0, 1])
def test_host_memory_that_one_rank_lacks_is_an_error_on_both(
    pair: Pair, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pinned memory runs out on one machine."""

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    pair.load("a0")
    before = pair.state()
    with monkeypatch.context() as patch:
        patch.setattr(pair.sets[rank]._deployment.ranks[0].bank._copier, "host_memory", fail)
        errors = pair.both(lambda adapters, at: adapters.load("a1", pair.paths[at]["a1"]))
        assert "RuntimeError: CUDA error: out of memory" in errors[rank]
        assert f"load of adapter 'a1' on rank {rank}: found" in errors[1 - rank]
        assert pair.state() == before
    pair.load("a1")
    assert pair.known_and_resident() == [("a0", True), ("a1", True)]


def test_misses_are_brought_in_on_both_ranks_alike(pair: Pair) -> None:
    pair.load("a0", "a1", "a2", "a3")

    def use(*names: str) -> Call:
        def call(own: bd.AdapterSet, rank: int) -> None:
            with own.use([*names]):
                pass

        return call

    for names in (("a2",), ("a1", "a3"), ("a0",)):
        assert pair.both(use(*names)) == ["", ""]
    assert pair.known_and_resident() == [("a0", True), ("a1", False), ("a2", False), ("a3", True)]


def test_a_cold_adapter_that_one_rank_lost_is_brought_in_by_none(pair: Pair) -> None:
    """The copies in host memory are gone, and so is one rank's folder: nobody is evicted for it."""
    pair.load("a0", "a1", "a2")
    for own in pair.sets:
        own._tiers.host.forget(own._tiers.current["a2"])
    shutil.rmtree(pair.paths[1]["a2"])
    before = pair.state()
    errors = pair.both(lambda own, rank: own.prefetch("a2"))
    assert "prefetch of adapters on rank 1" in errors[0]
    assert "found nothing" in errors[1]
    assert pair.state() == before


def test_ranks_that_use_different_adapters_are_told(pair: Pair) -> None:
    """As far as it shows: where one of them has to be brought in."""
    pair.load("a0", "a1", "a2", "a3")
    before = pair.state()
    errors = pair.both(lambda own, rank: own.prefetch("a2" if rank else "a3"))
    assert all("on rank 1: found in" in error and "same calls" in error for error in errors), errors
    assert pair.state() == before


def test_an_unload_of_one_rank_alone_is_refused_by_the_other(pair: Pair) -> None:
    pair.load("a0", "a1")
    errors = pair.both(lambda own, rank: own.unload("a1" if rank else "a0"))
    assert "rank 1" in errors[0]
    assert "rank 0" in errors[1]
    assert pair.known_and_resident() == [("a0", True), ("a1", True)]


def test_a_rank_that_does_not_come_is_named_and_nothing_changes(pair: Pair) -> None:
    pair.load("a0")
    before = pair.state()
    error = pair.one(lambda own, rank: own.load("a1", pair.paths[rank]["a1"]), 0)
    assert "rank 1" in error
    assert "nothing after 2 s" in error
    late = pair.one(lambda own, rank: own.load("a1", pair.paths[rank]["a1"]), 1)
    assert "this rank" in late, "it read everything, but the other has given up"
    assert pair.state() == before
    pair.load("a1")


def test_adapters_that_one_rank_cannot_read_at_the_start_fail_on_both(files: Files, masters: dict[str, Path]) -> None:
    store = HashStore()

    def start(rank: int) -> str:
        ranks = bd.Ranks(Mesh(2, "threads"), [rank], StoreAgreement(store, rank, 2, LIMIT))
        try:
            bd.load(files.model, {"a0": masters["a0"] if rank else files.model / "nowhere"}, ranks=ranks)
        except bd.AdapterError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(start, (0, 1)))
    assert "nowhere" in errors[0]
    assert "adapters to begin with on rank 0" in errors[1]
