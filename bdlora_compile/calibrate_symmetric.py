"""What all-reduces through symmetric memory cost, and up to which sizes they are the fastest; a part of `calibrate.py`.

The operator that served graphs call (`runtime/all_reduce.py`) goes each way in turn, as often as its result is needed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist

from bdlora_compile.collective_cost import sent_through
from bdlora_compile.first_ranks import measure_on_first
from bdlora_compile.machine import Link, SymmetricLimits, fit_link
from bdlora_compile.runtime.agreement import agreement_of
from bdlora_compile.runtime.all_reduce import all_reduce, buffer_on_all, group_obstacle

Seconds = Callable[[Callable[[], object], dist.ProcessGroup], float]
"""Times a call, over many in a row: seconds on the slowest rank of a group, the same on all of them."""

WAYS = ("one_shot", "two_shot", "nccl")


@dataclass(frozen=True, slots=True)
class Symmetric:
    """What was found over some ranks.

    Attributes:
        limits, one_shot, two_shot: as of `machine.Machine`; None where there is no symmetric memory.
        obstacle: why not.
    """

    limits: SymmetricLimits | None = None
    one_shot: Link | None = None
    two_shot: Link | None = None
    obstacle: str = ""


def measure_symmetric(seconds: Seconds, device: torch.device, sizes: Sequence[int], ranks: int) -> Symmetric:
    """Measure over the first ``ranks`` ranks; the others wait, and get the same result.

    Args:
        sizes: bytes of messages, in ascending order.

    Raises:
        ConfigError: times that do not grow with size, on all ranks.
    """
    times = measure_on_first(ranks, partial(_measure, seconds, device, sizes))
    if isinstance(times, str):
        return Symmetric(obstacle=times)
    # On every rank: what cannot be fitted must fail on all of them.
    return symmetric_costs(times, ranks)


def symmetric_costs(times: Mapping[int, Mapping[str, float]], ranks: int) -> Symmetric:
    """Limits, and latency and bandwidth of both ways, from measured times.

    Args:
        times: seconds, as of `fastest_limits`.

    Raises:
        ConfigError: times that do not grow with size.
    """

    def link(way: Literal["one_shot", "two_shot"]) -> Link:
        sent = float(sent_through(way, ranks))
        points = [(sent * size, of_way[way]) for size, of_way in times.items()]
        return fit_link(points, f"{way} all-reduce over {ranks} ranks")

    return Symmetric(fastest_limits(times), link("one_shot"), link("two_shot"))


def fastest_limits(times: Mapping[int, Mapping[str, float]]) -> SymmetricLimits:
    """The limits that choose what took the least time.

    Args:
        times: by bytes of a message the time of each of `WAYS`.
    """
    fastest = {size: min(WAYS, key=of_way.__getitem__) for size, of_way in times.items()}
    one = max((size for size, way in fastest.items() if way == "one_shot"), default=0)
    two = max((size for size, way in fastest.items() if way != "nccl"), default=0)
    return SymmetricLimits(one, two)


def _measure(
    seconds: Seconds, device: torch.device, sizes: Sequence[int], group: dist.ProcessGroup
) -> dict[int, dict[str, float]] | str:
    """Seconds by size and way, or why there is no symmetric memory."""
    largest = max(sizes)
    agreement = agreement_of([group])
    buffer, obstacle = buffer_on_all(agreement, group_obstacle(device), largest, group.group_name, device)
    if buffer is None:
        return obstacle
    bounds = {"one_shot": (largest, 0), "two_shot": (0, largest), "nccl": (0, 0)}
    times: dict[int, dict[str, float]] = {}
    for size in sizes:
        x = torch.zeros(size // 2, device=device, dtype=torch.bfloat16)
        times[size] = {
            way: seconds(partial(all_reduce, x, buffer, *of_way, group.group_name), group)
            for way, of_way in bounds.items()
        }
    return times
