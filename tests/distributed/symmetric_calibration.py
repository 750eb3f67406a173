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
from bdlora_compile.machine import SymmetricLimits

SIZES = [64, 256, 1024, 4096, 16384]
ONE_SHOT, TWO_SHOT = 256, 4096
"""Up to where the stand-in is fastest one-shot, and at all."""


def stand_in(x: Tensor, buffer: Tensor, one_shot: int, two_shot: int, group: str) -> float:
    """What a call would take: its way is told by the limits, as the operator is told."""
    assert buffer.numel() == max(SIZES), "room for the largest message"
    way = "one" if one_shot else "two" if two_shot else "nccl"
    best = "one" if x.nbytes <= ONE_SHOT else "two" if x.nbytes <= TWO_SHOT else "nccl"
    return 1.0 if way == best else 2.0


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


def main() -> int:
    """Each rank checks that it is told the same."""
    dist.init_process_group("gloo")
    wanted = Symmetric(SymmetricLimits(ONE_SHOT, TWO_SHOT))
    for ranks in (2, 3):
        assert found(ranks, buffer_of) == wanted, ranks
        assert found(ranks, no_buffer) == Symmetric(None, "rank 1: RuntimeError: no path to a peer"), ranks
    assert found(3, buffer_of, "no links") == Symmetric(None, "rank 0: no links")
    with patch("socket.gethostname", lambda: f"host {dist.get_rank()}"):
        assert found(2, buffer_of) == Symmetric(None, "the ranks are on several machines")
    print(f"rank {dist.get_rank()} agrees")
    dist.destroy_process_group()
    return 0
