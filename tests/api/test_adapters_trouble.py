"""Loads that fail, come at once or run beside rows that decode: what runs stays as it is, bit by bit."""

import gc
import inspect
import os
import resource
import shutil
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bdlora_compile as bd
from tests.api.conftest import TOLERANCE, Files, Served


def test_a_failed_load_changes_nothing(served: Served, tmp_path: Path) -> None:
    adapters = served.adapters
    served.load("a0")
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
            served.load("a0")
    served.load("a0")


def test_ten_thousand_unknown_names_leave_nothing(served: Served) -> None:
    served.load("a0")

    adapters = served.adapters
    calls = (adapters.unload, adapters.pin, adapters.unpin, adapters.prefetch, adapters.begin_prefetch, adapters.hold)

    def sizes() -> dict[str, int]:
        holders = (adapters, adapters._tiers, adapters._tiers.host, adapters._tiers.residents, served.model.bdlora)
        return {
            f"{type(holder).__name__}.{name}": len(value)
            for holder in holders
            for name, value in inspect.getmembers(holder)
            if name != "versions" and isinstance(value, dict | list | set) and not name.startswith("__")
        }

    before = adapters.stats(), sizes()
    assert before[1]["Tiers.current"] == 1, "the control: what is looked at is what would grow"
    for index in range(10_000):
        with pytest.raises(bd.AdapterError, match="no adapter of this name"), adapters.use(f"nobody-{index}"):
            pytest.fail("entered")
    for index in range(200):
        for call in calls:
            with pytest.raises(bd.AdapterError, match="no adapter of this name"):
                call(f"nobody-{index}")
    assert (adapters.stats(), sizes()) == before


def test_an_adapter_of_zeros_is_the_base_model(served: Served, tmp_path: Path) -> None:
    """Bit by bit; so is one of the smallest numbers there are, in the model's float64."""
    for name, value in (("zeros", 0.0), ("denormal", 1e-45)):
        folder = shutil.copytree(served.paths["a1"], tmp_path / name)
        weights = folder / "adapter_model.safetensors"
        save_file({key: torch.full_like(tensor, value) for key, tensor in load_file(weights).items()}, weights)
        served.adapters.load(name, folder)
        with served.adapters.use([name, None]):
            found = served.logits()
        with served.adapters.use(None):
            assert torch.equal(found, served.logits())
        served.adapters.unload(name)


def test_no_descriptor_left_is_an_error_of_the_load(served: Served) -> None:
    """As a process runs out of them: the load fails by an error of ours, and works when there are some again."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(served.paths["a0"], os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(bd.AdapterError, match="Too many open files"):
            served.load("a0")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    served.load("a0")


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
    served.load("a1", "a0")
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


@pytest.mark.parametrize("size", [1, 2])
def test_a_change_falls_between_two_forwards(served: Served, files: Files, size: int) -> None:
    """A forward that is under way holds off an admission, and an admission holds off a forward."""
    if size == 1:
        # The program of a real rank, not the interpreter of all ranks.
        model, own = bd.load(files.model, dtype=torch.float64, max_adapters=2, max_rank=4)
        model.compile(backend="bdlora")
        served = Served(model, own, served.paths, served.reference)
    served.load("a0", "a1", "a2")
    served.logits()
    calls: list[Callable[[], object]] = [served.logits, lambda: served.adapters.prefetch("a2")]
    for call in calls:
        thread = threading.Thread(target=call)
        with served.model.bdlora.step:
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
            assert {version.name for version in served.adapters._tiers.residents.versions} == {"a0", "a1"}
        thread.join(60)
        assert not thread.is_alive()
    assert "a2" in served.resident()


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
