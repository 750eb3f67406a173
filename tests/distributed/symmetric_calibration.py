"""One rank of the symmetric part of `bdlora calibrate`, with stand-ins for what only GPUs have: see
`test_symmetric_calibration.py`.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from bdlora_compile import calibrate_symmetric
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


def found(ranks: int, allocate: Callable[..., Tensor], obstacle: str = "") -> Symmetric:
    """By the first ranks of all."""
    with (
        patch.object(calibrate_symmetric, "group_obstacle", lambda _: obstacle),
        patch("bdlora_compile.runtime.all_reduce.symmetric_buffer", allocate),
        patch.object(calibrate_symmetric, "all_reduce", stand_in),
    ):
        return measure_symmetric(seconds, torch.device("cpu"), SIZES, ranks)


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
    with patch("socket.gethostname", lambda: f"host {dist.get_rank()}"):
        assert found(2, buffer_of) == Symmetric(obstacle="the ranks are on several machines")
    print(f"rank {dist.get_rank()} agrees")
    dist.destroy_process_group()
    return 0
