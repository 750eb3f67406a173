"""More adapters than fit: who comes in, who leaves, who stays, and how many a budget holds."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bdlora_compile as bd
from tests.api.conftest import TOLERANCE, Files, Served


def test_more_can_be_known_than_are_resident(served: Served) -> None:
    """Those that a `use` needs come in, the least recently used leave; every row is right, and nothing is compiled."""
    served.load(*served.paths)
    assert served.resident() == {"a0", "a1"}
    before = served.adapters.stats()
    with served.adapters.use(["a0", "a1"]):
        assert served.error(["a0", "a1"]) < TOLERANCE
    graphs = len(bd.reports(served.model))
    for first, second in (("a4", "a2"), ("a2", "a3"), ("a5", "a5"), ("a0", None)):
        with served.adapters.use([first, second]):
            assert served.error([first, second]) < TOLERANCE
            assert served.error(["a1", "a1"]) > 1e-3
    assert served.resident() == {"a5", "a0"}
    after = served.adapters.stats()
    assert (after.hits - before.hits, after.misses - before.misses) == (3, 5)
    assert after.evictions - before.evictions == 5
    assert after.stall_seconds > before.stall_seconds
    assert len(bd.reports(served.model)) == graphs


def test_running_rows_keep_their_slots(served: Served) -> None:
    """A third adapter does not fit beside two that are in use: the error says so, and what runs is untouched."""
    served.load("a0", "a1", "a2")
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
    served.load("a0", "a1", "a2")
    with pytest.raises(bd.AdapterError, match="2 slots"), served.adapters.use([["a0", "a1", "a2", "a0"]] * 2):
        pytest.fail("entered")
    assert served.resident() == {"a0", "a1"}


def test_a_pinned_adapter_stays(served: Served) -> None:
    served.load("a0", "a1", "a2", "a3")
    served.adapters.pin("a3")
    assert served.resident() == {"a1", "a3"}, "pinning brings it in"
    for name in ("a0", "a1", "a2"):
        with served.adapters.use(name):
            assert served.adapters["a3"].is_resident
    served.adapters.pin("a2")
    with pytest.raises(bd.AdapterError, match="2 pinned ones"), served.adapters.use("a0"):
        pytest.fail("entered")
    served.adapters.unpin("a3")
    with served.adapters.use("a0"):
        assert served.resident() == {"a2", "a0"}


def test_prefetch_makes_the_next_use_a_hit(served: Served) -> None:
    served.load("a0", "a1", "a2", "a3")
    served.adapters.prefetch(["a2", "a3"])
    misses = served.adapters.stats().misses
    with served.adapters.use(["a2", "a3"]):
        assert served.error(["a2", "a3"]) < TOLERANCE
    assert served.adapters.stats().misses == misses


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


def test_a_deployment_of_blocks_alone_has_a_smaller_pool(served: Served, files: Files) -> None:
    """Ordinary adapters of its rank are refused, before their data are read, and the statistics say that none fits."""
    ranks = bd.Ranks.lockstep(2)
    _, adapters = bd.load(files.model, dtype=torch.float64, max_adapters=2, max_rank=4, max_local_rank=2, ranks=ranks)
    stats = adapters.stats()
    assert stats.pool_bytes < served.adapters.stats().pool_bytes
    assert stats.ordinary_fit == 0
    assert stats.block_diagonal_fit is not None
    adapters.load("a1", served.paths["a1"])
    adapters.load("a3", served.paths["a3"])
    assert adapters.stats().resident == 2 <= stats.block_diagonal_fit
    with pytest.raises(bd.AdapterError, match=r"factors of rank 4 on a rank .* at most max_local_rank=2"):
        adapters.load("a0", served.paths["a0"])


def test_an_adapter_larger_than_the_pool_is_refused_at_load(served: Served, files: Files) -> None:
    _, adapters = bd.load(files.model, max_rank=4, pool_bytes=1000)
    with pytest.raises(bd.AdapterError, match="larger pool"):
        adapters.load("a0", served.paths["a0"])
    assert not adapters.names


@pytest.mark.parametrize(("name", "value"), [("pool_bytes", 0), ("host_bytes", -1), ("max_adapters", 0)])
def test_budgets_that_mean_nothing_are_refused(files: Files, name: str, value: int) -> None:
    with pytest.raises(bd.ConfigError, match=name):
        bd.load(files.model, **{name: value})  # type: ignore[arg-type]  # one of the integers
