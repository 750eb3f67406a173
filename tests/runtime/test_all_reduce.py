"""Which transport sums over the ranks: agreed by all of them, by size, and told; and the graph that calls it."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import bdlora_compile as bd
from bdlora_compile.factors import Layout
from bdlora_compile.ir import fake_tensor, stage_nodes
from bdlora_compile.machine import SymmetricLimits, find_machine
from bdlora_compile.placement import Mesh
from bdlora_compile.printer import print_graph
from bdlora_compile.runtime import all_reduce
from bdlora_compile.runtime.agreement import Agreement, Alone
from bdlora_compile.runtime.all_reduce import AllReduce, Wanted, group_obstacle, way
from bdlora_compile.transport import reduce_instead_of_gather, through_symmetric_memory
from tests.conftest import GoldenCheck
from tests.passes.graphs import plan_of
from tests.passes.test_fuse import merged
from tests.passes.test_lora_passes import DOWN, UP, column_and_row

H100 = find_machine("h100-nvlink")
LIMITS = SymmetricLimits(one_shot=1024, two_shot=4096)


class Others(Alone):
    """An agreement in which a second rank gives each of ``texts`` in turn."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)

    def exchange(self, topic: str, text: str, *, is_setup: bool = False) -> Sequence[str]:
        return [text, self.texts.pop(0).replace("HOST", text.split("\n")[0]).replace("LIMITS", text.split("\n")[1])]


def choose(wanted: Wanted, agreement: Agreement | None = None, ranks: int = 2) -> AllReduce:
    """The choice of a CPU process, or of one that takes itself for a GPU's (see `gpu`)."""
    mesh = Mesh(ranks, "group")
    return AllReduce.choose(wanted, mesh, H100, torch.bfloat16, torch.device("cpu"), agreement or Alone())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in this rank's way, and its buffer is ordinary memory."""
    monkeypatch.setattr(all_reduce, "_obstacle", lambda *_: "")
    monkeypatch.setattr(all_reduce, "symmetric_buffer", lambda size, *_: torch.zeros(size, dtype=torch.uint8))
    monkeypatch.setattr(all_reduce, "new_mailbox", lambda *_: torch.zeros(1, dtype=torch.int64))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))


def test_where_it_cannot_be_had_the_reason_is_told() -> None:
    """ "auto" falls back, "symmetric" refuses, "nccl" was asked for."""
    assert choose("auto").text == "lock-step: the ranks are in one process"
    assert choose("nccl").text == "lock-step: asked for"
    assert choose("auto", ranks=1).text == "none: one rank"
    assert choose("auto").buffer is None
    with pytest.raises(bd.ConfigError, match=r"all_reduce='symmetric'.*in one process.*'auto'"):
        choose("symmetric")
    with pytest.raises(bd.ConfigError, match=r"all_reduce='ring'.*auto, nccl, symmetric"):
        choose("ring")  # type: ignore[arg-type]  # what a user may write


@pytest.mark.usefixtures("gpu")
def test_all_ranks_take_it_or_none() -> None:
    """Another host, other limits, or a failure on either rank keeps all from it."""
    fine = "HOST\nLIMITS\n"
    found = choose("auto", Others(fine, fine, fine, fine))
    assert found.text.startswith("symmetric memory, one-shot to 1048576 bytes, two-shot to 16777216, nccl above")
    assert found.text.endswith("(h100-nvlink, measured); one-shot with residual and norm")
    assert found.mailbox is not None
    assert found.buffer is not None
    assert found.buffer.numel() == 16777216
    for first, second, reason in (
        ("elsewhere\nLIMITS\n", fine, "the ranks are on several machines"),
        ("HOST\nother\n", fine, "rank 1 was given another machine's limits than rank 0"),
        ("HOST\nLIMITS\nno link", fine, "rank 1: no link"),
        (fine, "HOST\nLIMITS\nRuntimeError: rendezvous", "rank 1: RuntimeError: rendezvous"),
    ):
        found = choose("auto", Others(first, second))
        assert (found.text, found.buffer) == (f"lock-step: {reason}", None)


@pytest.mark.usefixtures("gpu")
def test_norms_stay_apart_on_all_ranks_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where any rank's GPU cannot hold all programs at once, and where there are more ranks than the kernel is for."""
    fine, small = "HOST\nLIMITS\n", "HOST\nLIMITS\na GPU has 108 multiprocessors, 128 wanted"
    found = choose("auto", Others(fine, fine, small))
    assert found.text.endswith("; norms apart: rank 1: a GPU has 108 multiprocessors, 128 wanted")
    assert found.buffer is not None
    assert found.mailbox is None
    many = choose("auto", Others(fine, fine, fine), ranks=16)
    assert many.text.endswith("; norms apart: rank 0: the kernel is for up to 8 ranks")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=108))
    own = choose("auto", Others(fine, fine, fine))
    assert own.text.endswith("; norms apart: rank 0: a GPU has 108 multiprocessors, 128 wanted")


@pytest.mark.usefixtures("gpu")
def test_a_mailbox_that_a_rank_lacks_keeps_norms_apart_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums go through symmetric memory all the same."""
    fine = "HOST\nLIMITS\n"
    theirs = choose("auto", Others(fine, fine, fine, "HOST\nLIMITS\nOutOfMemoryError: full"))
    assert theirs.text.endswith("; norms apart: rank 1: OutOfMemoryError: full")

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("no address")

    monkeypatch.setattr(all_reduce, "new_mailbox", fail)
    own = choose("auto", Others(fine, fine, fine, fine))
    assert own.text.endswith("; norms apart: rank 0: RuntimeError: no address")
    for found in (theirs, own):
        assert found.buffer is not None
        assert found.mailbox is None


@pytest.mark.usefixtures("gpu")
def test_a_failed_rendezvous_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("CUDA driver error\nmore")

    monkeypatch.setattr(all_reduce, "symmetric_buffer", fail)
    assert choose("auto", ranks=4).text == "lock-step: RuntimeError: CUDA driver error"


def test_the_way_follows_the_size() -> None:
    """Sizes that are no multiple of what the kernels move go through the group."""
    sizes = {16: "one-shot", 1024: "one-shot", 1040: "group", 1056: "two-shot", 4096: "two-shot", 4128: "group"}
    assert {size: way(size, 1024, 4096, 2) for size in sizes} == sizes
    assert way(24, 1024, 4096, 2) == way(0, 1024, 4096, 2) == "group"


def test_limits_of_the_nearest_measured_number_of_ranks() -> None:
    """One-shot a rank reads all of N - 1 peers: 1 MiB of one peer is 150 KB of seven."""
    assert H100.symmetric_limits(2) == SymmetricLimits(1048576, 16777216)
    assert H100.symmetric_limits(8) == SymmetricLimits(1048576 // 7, 16777216)
    of_eight = replace(H100, symmetric={8: SymmetricLimits(1 << 20, 4 << 20)})
    # There is no room for more than the largest message.
    assert of_eight.symmetric_limits(2) == SymmetricLimits(4 << 20, 4 << 20)
    assert find_machine("cpu-gloo").symmetric_limits(2) is None


def test_gathers_of_h_become_reduces_of_shares(golden: GoldenCheck) -> None:
    """What every rank puts in adds up to what a gather would put side by side; a wrong rank's share does not."""
    plan = plan_of(2, (UP, DOWN), Layout.SLORA)
    shares = [torch.randn(6, 4), torch.randn(6, 4)]

    def padded(rank: int, share: torch.Tensor) -> torch.Tensor:
        captured = merged(column_and_row(), plan)
        assert [*stage_nodes(captured.graph, "_c10d_functional::all_gather_into_tensor")]
        reduce_instead_of_gather(captured, plan.mesh, rank)
        captured.graph.lint()
        assert not [*stage_nodes(captured.graph, "_c10d_functional::all_gather_into_tensor")]
        if rank == 0:
            golden("gathers_as_reduces", print_graph(captured.graph))
        (pad,) = stage_nodes(captured.graph, "pad")
        width = fake_tensor(pad.args[0]).shape[1]  # type: ignore[arg-type]
        return torch.nn.functional.pad(share[:, :width], pad.args[1])  # type: ignore[arg-type]

    both = padded(0, shares[0]) + padded(1, shares[1])
    width = both.shape[1] // 2
    assert torch.equal(both, torch.cat([share[:, :width] for share in shares], 1))
    assert not torch.equal(padded(1, shares[0]) + padded(1, shares[1]), both)


def test_the_graph_calls_it(golden: GoldenCheck) -> None:
    """Each all-reduce and its wait become one call that reads the buffer; without one nothing changes."""
    plan = plan_of(2, (UP, DOWN))
    captured = merged(column_and_row(), plan)
    before = print_graph(captured.graph)
    through_symmetric_memory(captured, AllReduce("gloo: asked for"), plan.mesh, 0)
    assert print_graph(captured.graph) == before
    through_symmetric_memory(captured, AllReduce("", torch.zeros(4096, dtype=torch.uint8), LIMITS), plan.mesh, 0)
    captured.graph.lint()
    golden("symmetric_memory", print_graph(captured.graph))
    assert not [*stage_nodes(captured.graph, "_c10d_functional::all_reduce")]


@pytest.mark.parametrize(
    ("backends", "obstacle"),
    [
        ("cpu:gloo,cuda:nccl", ""),
        ("cuda:nccl", ""),
        ("cpu:gloo,cuda:gloo", "the process group is of gloo, not nccl"),
        ("cpu:fake,cuda:fake", "the process group is of fake, not nccl"),
    ],
)
def test_what_counts_is_what_a_group_has_for_gpus(
    monkeypatch: pytest.MonkeyPatch, backends: str, obstacle: str
) -> None:
    """A group that was made without a name has a backend for each kind of device, and none of its own."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "undefined")
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    assert group_obstacle(torch.device("cuda")) == obstacle


@pytest.mark.parametrize(("name", "is_told"), [("NVIDIA H100 80GB HBM3", False), ("NVIDIA H200", True)])
def test_limits_of_another_gpu_are_told(monkeypatch: pytest.MonkeyPatch, gpu: None, name: str, is_told: bool) -> None:
    """Those that come with the package were measured on an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    mesh, agreement = Mesh(2, "group"), Alone()
    found = AllReduce.choose("auto", mesh, H100, torch.bfloat16, torch.device("cuda"), agreement)
    assert ("of another GPU than this NVIDIA H200: `bdlora calibrate` measures it" in found.text) is is_told
