"""One rank of the symmetric part of `bdlora calibrate`, with stand-ins for what only GPUs have: see
`test_symmetric_calibration.py`.
"""

from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from bdlora_compile import calibrate, calibrate_symmetric
from bdlora_compile.calibrate_symmetric import Symmetric, measure_symmetric
from bdlora_compile.errors import ConfigError
from bdlora_compile.machine import SymmetricLimits

SIZES = [64, 256, 1024, 4096, 16384]
ONE_SHOT, TWO_SHOT = 256, 4096
"""Up to where the stand-in is fastest one-shot, and at all."""
COSTS = {"one": (1.0, 256.0), "two": (1.8, 1024.0), "nccl": (5.0, 4096.0)}
"""Its latency, and bytes of a message in a second."""


def stand_in(x: Tensor, buffer: Tensor, one_shot: int, two_shot: int, group: str) -> float:
    """What a call would take: its way is told by the limits, as the operator is told."""
    assert buffer.numel() == max(SIZES), "room for the largest message"
    way = "one" if one_shot else "two" if two_shot else "nccl"
    latency, bandwidth = COSTS[way]
    return latency + x.nbytes / bandwidth


def seconds(call: Callable[[], object], group: dist.ProcessGroup) -> float:
    """Of the slowest rank, which is another one each time."""
    taken = call()
    assert isinstance(taken, float)
    slowest = torch.tensor(taken)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
    return float(slowest)


def buffer_of(size: int, *_: object) -> Tensor:
    """Ordinary memory."""
    return torch.zeros(size, dtype=torch.uint8)


def no_buffer(*_: object) -> Tensor:
    """Rank 1's links are down."""
    if dist.get_rank() == 1:
        raise RuntimeError("no path to a peer\nand more")
    return buffer_of(max(SIZES))


class Rendezvous:
    """Memory of ranks that meet as torch has it: in their group's store, if each has met others equally often."""

    def __init__(self) -> None:
        self._number = 0

    def __call__(self, size: int, name: str, *_: object) -> Tensor:
        number, self._number = self._number, self._number + 1
        groups: Any = dist.distributed_c10d
        store = PrefixStore(name, groups._get_default_store())
        ranks = dist.get_process_group_ranks(groups._resolve_process_group(name))
        store.set(f"{number}/{dist.get_rank()}", "here")
        store.wait([f"{number}/{rank}" for rank in ranks], timedelta(seconds=5))
        return buffer_of(size)


def stand_ins(allocate: Callable[..., Tensor], obstacle: str = "") -> ExitStack:
    """Inside a block."""
    stack = ExitStack()
    stack.enter_context(patch.object(calibrate_symmetric, "group_obstacle", lambda _: obstacle))
    stack.enter_context(patch("bdlora_compile.runtime.all_reduce.symmetric_buffer", allocate))
    stack.enter_context(patch.object(calibrate_symmetric, "all_reduce", stand_in))
    return stack


def found(ranks: int, allocate: Callable[..., Tensor], obstacle: str = "") -> Symmetric:
    """By the first ranks of all."""
    with stand_ins(allocate, obstacle):
        return measure_symmetric(seconds, torch.device("cpu"), SIZES, ranks)


def measured_over() -> list[int]:
    """Numbers of ranks of which a whole calibration knows symmetric memory."""
    settings = calibrate.Settings(groups=1, calls=1, sizes=[], symmetric_sizes=SIZES, copied=64, side=4)

    def points(timer: object, device: object, settings: object, ranks: int) -> list[calibrate.Point]:
        return [calibrate.Point(kind, ranks, size, size) for kind in calibrate._KINDS for size in (1.0, 2.0)]

    def seconds_of(timer: object, call: Callable[[], object], group: object = None) -> float:
        taken = call()
        return taken if isinstance(taken, float) else 1.0

    with (
        stand_ins(Rendezvous()),
        patch.object(calibrate, "_collectives", points),
        patch.object(calibrate.Timer, "seconds", seconds_of),
    ):
        machine, _ = calibrate.measure(torch.device("cpu"), settings, "here")
    return [*machine.symmetric]


def check(measured: Symmetric, ranks: int) -> None:
    """Limits where the stand-in's costs cross; links by the bytes that a rank sends each way."""
    assert measured.limits == SymmetricLimits(ONE_SHOT, TWO_SHOT), measured
    sent = {"one": ranks - 1, "two": 2 * (ranks - 1) / ranks}
    for way, link in (("one", measured.one_shot), ("two", measured.two_shot)):
        latency, bandwidth = COSTS[way]
        assert link is not None, way
        # Times are float32.
        assert abs(link.latency / latency - 1) < 1e-4, (way, link)
        assert abs(link.bandwidth / (bandwidth * sent[way]) - 1) < 1e-4, (way, link)


def refused(ranks: int) -> None:
    """Times that shrink with size are an error on every rank, also on one that waits: else it would wait for ever."""
    try:
        found(ranks, buffer_of)
    except ConfigError as error:
        assert "one_shot all-reduce" in str(error), error
    else:
        raise AssertionError(f"{ranks} ranks: times that shrink were fitted")


def main() -> int:
    """Each rank checks that it is told the same."""
    dist.init_process_group("gloo")
    for ranks in (2, 3):
        check(found(ranks, buffer_of), ranks)
        assert found(ranks, no_buffer) == Symmetric(obstacle="rank 1: RuntimeError: no path to a peer"), ranks
    assert found(3, buffer_of, "no links") == Symmetric(obstacle="rank 0: no links")
    for ranks in (2, 3):
        with patch.dict(COSTS, one=(9.0, -1e5)):
            refused(ranks)
    assert measured_over() == [2, 3]
    with patch("socket.gethostname", lambda: f"host {dist.get_rank()}"):
        assert found(2, buffer_of) == Symmetric(obstacle="the ranks are on several machines")
    print(f"rank {dist.get_rank()} agrees")
    dist.destroy_process_group()
    return 0
