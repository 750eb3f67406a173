"""Adapters while serving: loaded, loaded again, pinned, evicted and brought back; what rows compute stays right."""

import gc
import json
import shutil
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bdlora_compile as bd
from tests.api.conftest import Files
from tests.models import AdapterSpec, Reference, relative_error, save_adapter

TOLERANCE = 2e-6
"""As in tests/numerics/test_compiled.py."""
IDS = torch.tensor([[5, 9, 33, 71], [8, 8, 100, 4]])
COUNT = 6


@dataclass(frozen=True)
class Served:
    """A compiled model on two ranks with room for two adapters, and folders of six."""

    model: Any
    adapters: bd.AdapterSet
    paths: dict[str, Path]
    reference: Reference

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        return self.model(IDS).logits  # type: ignore[no-any-return]  # transformers is untyped for mypy

    def error(self, rows: list[str | None]) -> float:
        """Of what runs now, against PEFT's adapters of these names."""
        return relative_error(self.logits(), self.reference.logits(IDS, rows))


@pytest.fixture(scope="module")
def compiled(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Served:
    torch._dynamo.reset()
    folder = tmp_path_factory.mktemp("six")
    paths = {
        f"a{index}": save_adapter(
            AdapterSpec(rank=4, nblocks=2 * (index % 2)), files.model, folder / f"a{index}", index
        )
        for index in range(COUNT)
    }
    model, adapters = bd.load(files.model, dtype=torch.float64, max_adapters=2, max_rank=4, ranks=bd.Ranks.lockstep(2))
    model.compile(backend="bdlora")
    return Served(model, adapters, paths, Reference(files.model, paths, torch.float64))


@pytest.fixture
def served(compiled: Served) -> Served:
    """Nothing is loaded, whatever the test before did."""
    adapters = compiled.adapters
    for name in adapters.names:
        adapters.unload(name)
    stats = adapters.stats()
    assert (stats.known, stats.resident, stats.in_host_memory) == (0, 0, 0)
    assert (stats.pool_used_bytes, stats.host_used_bytes) == (0, 0)
    return compiled


def load(served: Served, *names: str) -> None:
    for name in names:
        served.adapters.load(name, served.paths[name])


def resident(served: Served) -> set[str]:
    return {name for name in served.adapters.names if served.adapters[name].is_resident}


def test_more_can_be_known_than_are_resident(served: Served) -> None:
    """Those that a `use` needs come in, the least recently used leave; every row is right, and nothing is compiled."""
    load(served, *served.paths)
    assert resident(served) == {"a0", "a1"}
    before = served.adapters.stats()
    with served.adapters.use(["a0", "a1"]):
        assert served.error(["a0", "a1"]) < TOLERANCE
    graphs = len(bd.reports(served.model))
    for first, second in (("a4", "a2"), ("a2", "a3"), ("a5", "a5"), ("a0", None)):
        with served.adapters.use([first, second]):
            assert served.error([first, second]) < TOLERANCE
            assert served.error(["a1", "a1"]) > 1e-3
    assert resident(served) == {"a5", "a0"}
    after = served.adapters.stats()
    assert (after.hits - before.hits, after.misses - before.misses) == (3, 5)
    assert after.evictions - before.evictions == 5
    assert after.stall_seconds > before.stall_seconds
    assert len(bd.reports(served.model)) == graphs


def test_running_rows_keep_their_slots(served: Served) -> None:
    """A third adapter does not fit beside two that are in use: the error says so, and what runs is untouched."""
    load(served, "a0", "a1", "a2")
    with served.adapters.use(["a0", "a1"]):
        before = served.logits()
        with (
            pytest.raises(bd.AdapterError, match=r"taken by 2 adapters of running rows, 0 pinned.*wait for rows"),
            served.adapters.use("a2"),
        ):
            pytest.fail("entered")
        assert torch.equal(served.logits(), before)
        assert served.adapters["a0"].references == 1
    with served.adapters.use("a2"):
        assert served.error(["a2", "a2"]) < TOLERANCE


def test_more_adapters_than_slots_in_one_call(served: Served) -> None:
    load(served, "a0", "a1", "a2")
    with pytest.raises(bd.AdapterError, match="2 slots"), served.adapters.use([["a0", "a1", "a2", "a0"]] * 2):
        pytest.fail("entered")
    assert resident(served) == {"a0", "a1"}


def test_a_pinned_adapter_stays(served: Served) -> None:
    load(served, "a0", "a1", "a2", "a3")
    served.adapters.pin("a3")
    assert resident(served) == {"a1", "a3"}, "pinning brings it in"
    for name in ("a0", "a1", "a2"):
        with served.adapters.use(name):
            assert served.adapters["a3"].is_resident
    served.adapters.pin("a2")
    with pytest.raises(bd.AdapterError, match="2 pinned ones"), served.adapters.use("a0"):
        pytest.fail("entered")
    served.adapters.unpin("a3")
    with served.adapters.use("a0"):
        assert resident(served) == {"a2", "a0"}


def test_prefetch_makes_the_next_use_a_hit(served: Served) -> None:
    load(served, "a0", "a1", "a2", "a3")
    served.adapters.prefetch(["a2", "a3"])
    misses = served.adapters.stats().misses
    with served.adapters.use(["a2", "a3"]):
        assert served.error(["a2", "a3"]) < TOLERANCE
    assert served.adapters.stats().misses == misses


def test_another_content_is_another_version(served: Served) -> None:
    """Rows that run finish on the contents they began with, bit by bit; later ones get the new."""
    adapters = served.adapters
    adapters.load("x", served.paths["a0"])
    first = adapters.version("x")
    with adapters.use(["x", None]):
        before = served.logits()
        adapters.load("x", served.paths["a1"])
        assert adapters.version("x") != first
        assert torch.equal(served.logits(), before)
        with adapters.use(["x", None]):
            assert served.error(["a1", None]) < TOLERANCE
        assert torch.equal(served.logits(), before)
        assert adapters.stats().resident == 2
    assert adapters.stats().resident == 1, "the former contents went with their last row"
    adapters.load("x", served.paths["a0"])
    assert adapters.version("x") == first
    with adapters.use(["x", None]):
        assert torch.equal(served.logits(), before)


def test_the_same_content_again_changes_nothing(served: Served) -> None:
    adapters = served.adapters
    info = adapters.load("x", served.paths["a0"])
    assert adapters.load("x", served.paths["a0"]) == info
    assert adapters.load("y", served.paths["a0"]).version == info.version
    assert adapters.stats().resident == 2


def test_a_pinned_name_that_is_loaded_again_stays_pinned_and_resident(served: Served) -> None:
    load(served, "a0", "a1")
    served.adapters.pin("a0")
    served.adapters.load("a0", served.paths["a2"])
    info = served.adapters["a0"]
    assert info.is_pinned
    assert info.is_resident
    served.adapters.unpin("a0")


def test_a_pinned_name_that_has_no_room_for_new_contents_keeps_the_former(served: Served) -> None:
    """Rows use the former, and another adapter; nothing can leave."""
    adapters = served.adapters
    load(served, "a0", "a1")
    adapters.pin("a0")
    version = adapters.version("a0")
    with adapters.use(["a0", "a1"]):
        before = served.logits()
        with pytest.raises(bd.AdapterError, match="taken by 2 adapters"):
            adapters.load("a0", served.paths["a2"])
        assert adapters.version("a0") == version
        assert torch.equal(served.logits(), before)


def test_an_adapter_in_use_that_is_unloaded_serves_its_rows_to_the_end(served: Served) -> None:
    adapters = served.adapters
    load(served, "a0", "a1")
    with adapters.use(["a0", "a1"]):
        before = served.logits()
        adapters.unload("a0")
        assert "a0" not in adapters
        assert torch.equal(served.logits(), before)
        adapters.load("a0", served.paths["a3"])
        assert not adapters["a0"].is_resident, "its slot is not free yet"
        assert torch.equal(served.logits(), before)
    with adapters.use(["a0", None]):
        assert served.error(["a3", None]) < TOLERANCE


def test_what_was_given_up_in_host_memory_is_read_again(served: Served, files: Files, tmp_path: Path) -> None:
    """Without a budget an evicted adapter is read from its folder, and refused if that has changed."""
    paths = {name: shutil.copytree(served.paths[name], tmp_path / name) for name in ("a0", "a1", "a2")}
    _, adapters = bd.load(files.model, paths, max_adapters=1, host_bytes=0)
    assert adapters.stats().in_host_memory == 0
    with adapters.use("a2"):
        assert adapters.stats().disk_reads == 1
    weights = paths["a1"] / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, weights)
    with pytest.raises(bd.AdapterError, match=r"other contents at .*load it again"), adapters.use("a1"):
        pytest.fail("entered")
    assert adapters["a2"].is_resident, "nobody was evicted for it"
    adapters.load("a1", paths["a1"])
    with adapters.use("a1"):
        assert adapters["a1"].is_resident
    shutil.rmtree(paths["a0"])
    with pytest.raises(bd.AdapterError, match="nothing"), adapters.use("a0"):
        pytest.fail("entered")


def test_host_memory_keeps_what_was_used_last(served: Served, files: Files) -> None:
    one = served.adapters.load("a0", served.paths["a0"]).nbytes
    _, adapters = bd.load(
        files.model, max_adapters=1, max_rank=4, dtype=torch.float64, host_bytes=2 * one, ranks=bd.Ranks.lockstep(2)
    )
    for name in ("a0", "a2", "a4"):
        adapters.load(name, served.paths[name])
    assert adapters.stats().host_used_bytes == 2 * one
    for name, reads in (("a4", 0), ("a2", 0), ("a0", 1), ("a2", 1), ("a4", 2)):
        with adapters.use(name):
            assert adapters.stats().disk_reads == reads, name


def rewrite(field: str, value: object) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))

    return act


def change_a_weight(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    list(tensors.values())[3][1, 1] *= 1.0001
    save_file(tensors, path)


def store_in_another_order(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"written": "again"})


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        (change_a_weight, True),
        (rewrite("lora_alpha", 13), True),
        (rewrite("use_rslora", True), True),
        (rewrite("lora_dropout", 0.5), False),
        (rewrite("inference_mode", False), False),
        (store_in_another_order, False),
    ],
    ids=["weight", "alpha", "rslora", "dropout", "inference_mode", "file"],
)
def test_a_version_is_what_changes_the_mathematics(
    served: Served, tmp_path: Path, change: Callable[[Path], None], is_another: bool
) -> None:
    first = served.adapters.load("x", served.paths["a0"]).version
    copy = shutil.copytree(served.paths["a0"], tmp_path / "copy")
    change(copy)
    assert (served.adapters.load("x", copy).version != first) == is_another


@pytest.mark.parametrize("size", [1, 2])
def test_a_version_does_not_depend_on_the_ranks(served: Served, files: Files, size: int) -> None:
    _, adapters = bd.load(files.model, {"a1": served.paths["a1"]}, ranks=bd.Ranks.lockstep(size))
    assert adapters.version("a1") == served.adapters.load("a1", served.paths["a1"]).version


def test_a_failed_load_changes_nothing(served: Served, tmp_path: Path) -> None:
    adapters = served.adapters
    load(served, "a0")
    broken = shutil.copytree(served.paths["a1"], tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with adapters.use(["a0", None]):
        before, stats = served.logits(), adapters.stats()
        for name in ("a0", "new"):
            with pytest.raises(bd.AdapterError, match="no valid safetensors"):
                adapters.load(name, broken)
        assert adapters.stats() == stats
        assert adapters.names == ("a0",)
        assert torch.equal(served.logits(), before)


def test_no_host_memory_is_an_error_of_the_load(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pinned memory runs out: an error of ours, and the next load works."""

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    banks = [rank.bank for rank in served.model.bdlora.ranks]
    with monkeypatch.context() as patch:
        patch.setattr(type(banks[0]._copier), "host_memory", fail)
        with pytest.raises(bd.AdapterError, match="RuntimeError: CUDA error: out of memory"):
            load(served, "a0")
    load(served, "a0")


def test_ten_thousand_unknown_names_leave_nothing(served: Served) -> None:
    load(served, "a0")

    def sizes() -> dict[str, int]:
        return {name: len(value) for name, value in vars(served.adapters).items() if hasattr(value, "__len__")}

    before = served.adapters.stats(), sizes()
    for index in range(10_000):
        with pytest.raises(bd.AdapterError, match="no adapter of this name"), served.adapters.use(f"nobody-{index}"):
            pytest.fail("entered")
    assert (served.adapters.stats(), sizes()) == before


def test_two_loads_of_one_name_at_once(served: Served) -> None:
    """The last one wins, whole; the other leaves nothing behind."""
    adapters, paths, errors = served.adapters, served.paths, []
    start = threading.Barrier(4)

    def again(path: Path) -> None:
        start.wait()
        for _ in range(3):
            try:
                adapters.load("x", path)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=again, args=(paths[f"a{index % 2}"],)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert adapters.stats().resident == 1
    assert adapters.stats().in_host_memory == 1
    with adapters.use(["x", None]):
        errors_of = {name: served.error([name, None]) for name in ("a0", "a1")}
    assert min(errors_of.values()) < TOLERANCE


def test_loads_in_a_thread_do_not_touch_running_rows(served: Served) -> None:
    """Load and unload in a loop, with moves of chunks, while other rows decode: bit by bit as without."""
    adapters = served.adapters
    load(served, "a1", "a0")
    adapters.unload("a1")
    compactions = adapters.stats().compactions
    with adapters.use(["a0", None]):
        quiet = served.logits()
        stop, errors = threading.Event(), []

        def churn() -> None:
            try:
                while not stop.is_set():
                    for name in ("a1", "a2", "a3"):
                        adapters.load(name, served.paths[name])
                        adapters.prefetch(name)
                    for name in ("a1", "a2", "a3"):
                        adapters.unload(name)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=churn)
        thread.start()
        equal = [torch.equal(served.logits(), quiet) for _ in range(50)]
        stop.set()
        thread.join()
    assert not errors
    assert all(equal)
    assert adapters.stats().compactions > compactions, "the running adapter was moved to the front"


def test_a_load_in_the_background_is_seen_when_it_is_committed(served: Served) -> None:
    adapters = served.adapters
    pending = adapters.begin_load("x", served.paths["a0"])
    assert "x" not in adapters
    assert pending.commit().name == "x"
    assert pending.is_staged
    with adapters.use(["x", None]):
        assert served.error(["a0", None]) < TOLERANCE
    failing = adapters.begin_load("y", served.paths["a0"] / "nowhere")
    with pytest.raises(bd.AdapterError, match="nowhere"):
        failing.commit()


def test_a_prefetch_in_the_background_leaves_nothing_to_read(served: Served, files: Files, tmp_path: Path) -> None:
    """What it read is used by the commit; a name that was loaded again meanwhile is brought in as it is now."""
    paths = {name: shutil.copytree(served.paths[name], tmp_path / name) for name in ("a0", "a1", "a2")}
    _, adapters = bd.load(files.model, paths, max_adapters=2, host_bytes=0)
    pending = adapters.begin_prefetch(["a2"])
    pending._reading.result()
    shutil.rmtree(paths["a2"])
    assert not adapters["a2"].is_resident
    pending.commit()
    assert adapters["a2"].is_resident
    pending = adapters.begin_prefetch("a0")
    adapters.load("a0", served.paths["a3"])
    pending.commit()
    assert adapters["a0"].is_resident
    assert adapters.version("a0") == served.adapters.load("a3", served.paths["a3"]).version
    pending = adapters.begin_prefetch(["a1", "a2"])
    adapters.unload("a1")
    with pytest.raises(bd.AdapterError, match="no adapter of this name"):
        pending.commit()


def test_a_known_adapter_takes_kilobytes(served: Served, files: Files) -> None:
    """Thousands may be known: neither their factors nor their descriptions are kept."""
    _, adapters = bd.load(files.model, max_adapters=1, max_rank=4, host_bytes=0)
    adapters.load("first", served.paths["a0"])
    tracemalloc.start()
    try:
        for index in range(100):
            adapters.load(f"n{index}", served.paths["a0"])
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 100 * 8_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 129, "-x", "ü", None, 3])
def test_malformed_names_are_refused(served: Served, name: Any) -> None:
    with pytest.raises(bd.AdapterError, match="outside the pattern"):
        served.adapters.load(name, served.paths["a0"])


def test_stats_say_how_many_of_a_kind_the_budget_holds(served: Served, files: Files) -> None:
    """Block-diagonal adapters are cut by the number of ranks; of an ordinary one every rank holds one factor whole."""
    stats = served.adapters.stats()
    assert stats.ordinary_fit == 2
    assert stats.block_diagonal_fit is not None
    assert stats.block_diagonal_fit > stats.ordinary_fit
    _, adapters = bd.load(
        files.model, dtype=torch.float64, max_rank=4, pool_bytes=stats.pool_bytes, ranks=bd.Ranks.lockstep(2)
    )
    own = adapters.stats()
    assert own.pool_bytes == stats.pool_bytes
    assert own.slots == max(8, stats.block_diagonal_fit)
    blocks = [name for index, name in enumerate(served.paths) if index % 2]
    for number in range(stats.block_diagonal_fit + 1):
        adapters.load(f"b{number}", served.paths[blocks[0]])
    assert adapters.stats().resident == stats.block_diagonal_fit
    for name in adapters.names:
        adapters.unload(name)
    for number in range(stats.ordinary_fit + 1):
        adapters.load(f"d{number}", served.paths["a0"])
    assert adapters.stats().resident == stats.ordinary_fit


def test_an_adapter_larger_than_the_pool_is_refused_at_load(served: Served, files: Files) -> None:
    _, adapters = bd.load(files.model, max_rank=4, pool_bytes=1000)
    with pytest.raises(bd.AdapterError, match="larger pool"):
        adapters.load("a0", served.paths["a0"])
    assert not adapters.names


@pytest.mark.parametrize(("name", "value"), [("pool_bytes", 0), ("host_bytes", -1), ("max_adapters", 0)])
def test_budgets_that_mean_nothing_are_refused(files: Files, name: str, value: int) -> None:
    with pytest.raises(bd.ConfigError, match=name):
        bd.load(files.model, **{name: value})  # type: ignore[arg-type]  # one of the integers
