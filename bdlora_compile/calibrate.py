"""Measure the constants of the cost model (`machine.py`) on this machine; run by ``bdlora calibrate`` on every rank.

A single rank has no collectives: its machine knows memory, products and the cost of a kernel.

On GPUs a measurement is the replay of a CUDA graph of many dependent calls, as in serving; on CPUs it is a loop of
calls. All ranks measure at once, since they share memory and links when they serve. Times are medians of groups of
calls, on the slowest rank.
"""

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bdlora_compile.calibrate_symmetric import Symmetric, measure_symmetric
from bdlora_compile.census import wire_share
from bdlora_compile.errors import BdloraError
from bdlora_compile.first_ranks import measure_on_first
from bdlora_compile.machine import CollectiveKind, Link, Machine, fit_link

_KINDS: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather_into_tensor")


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured.

    Attributes:
        groups: timed groups of calls, whose median is taken.
        calls: calls of a group.
        sizes: payloads of collectives in bytes.
        symmetric_sizes: the same of all-reduces through symmetric memory, on GPUs.
        copied: bytes of the tensor that memory is measured with.
        side: of the square matrices that products are measured with.
    """

    groups: int
    calls: int
    sizes: Sequence[int]
    symmetric_sizes: Sequence[int]
    copied: int
    side: int

    @classmethod
    def choose(cls, device: torch.device, quick: bool) -> "Settings":
        """Sizes beyond caches, and times of seconds in all."""
        if device.type == "cuda":
            sizes = [2**power for power in range(10, 26, 3 if quick else 1)]
            shared = [2**power for power in range(13, 25, 3 if quick else 1)]
            return cls(3 if quick else 9, 20, sizes, shared, 2**30, 8192)
        sizes = [2**power for power in range(10, 23, 6 if quick else 2)]
        return cls(3 if quick else 7, 5 if quick else 20, sizes, [], 2**24 if quick else 2**26, 256 if quick else 1024)


@dataclass(frozen=True, slots=True)
class Point:
    """One measured collective: wire bytes of a rank, and seconds."""

    kind: CollectiveKind
    ranks: int
    wire_bytes: float
    seconds: float


class Timer:
    """Seconds of a call on the slowest rank."""

    def __init__(self, device: torch.device, settings: Settings) -> None:
        self._device = device
        self._settings = settings

    def seconds(self, call: Callable[[], object], group: dist.ProcessGroup | None = None) -> float:
        """Median time of one of many dependent calls, the largest of the ranks of ``group`` (all by default)."""
        run = self._graph(call) if self._device.type == "cuda" else self._loop(call)
        run()
        times = []
        for _ in range(self._settings.groups):
            dist.barrier(group)
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) / self._settings.calls)
        slowest = torch.tensor(statistics.median(times), dtype=torch.float64, device=self._device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
        return float(slowest)

    def _loop(self, call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(self._settings.calls):
                call()

        return run

    def _graph(self, call: Callable[[], object]) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(self._settings.calls):
                call()

        def run() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return run


def measure(device: torch.device, settings: Settings, name: str) -> tuple[Machine, list[Point]]:
    """The machine's constants, and the collectives that they were fitted to; the same on every rank."""
    timer = Timer(device, settings)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    launch = timer.seconds(_launch(device))
    flat = torch.zeros(settings.copied // dtype.itemsize, device=device, dtype=dtype)
    memory = 2 * flat.nbytes / timer.seconds(lambda: flat.add_(1))
    square = torch.randn(settings.side, settings.side, device=device, dtype=dtype)
    product = torch.empty_like(square)
    flops = 2 * settings.side**3 / timer.seconds(lambda: torch.mm(square, square, out=product))
    points = [point for ranks in _group_sizes() for point in _collectives(timer, device, settings, ranks)]
    links = {kind: {ranks: _link(points, kind, ranks) for ranks in _group_sizes()} for kind in _KINDS}
    sizes = settings.symmetric_sizes
    # The largest group first: torch counts a process's rendezvous, and ranks meet only if their counts are equal
    # (https://github.com/pytorch/pytorch/issues/196082). The file has them in ascending order.
    largest_first = reversed(_group_sizes())
    shared = {ranks: measure_symmetric(timer.seconds, device, sizes, ranks) for ranks in largest_first if sizes}
    shared = dict(sorted(shared.items()))
    machine = Machine(
        name,
        _source(device, shared),
        memory,
        flops,
        launch,
        all_reduce=links["all_reduce"],
        all_gather=links["all_gather_into_tensor"],
        symmetric={ranks: found.limits for ranks, found in shared.items() if found.limits is not None},
        one_shot={ranks: found.one_shot for ranks, found in shared.items() if found.one_shot is not None},
        two_shot={ranks: found.two_shot for ranks, found in shared.items() if found.two_shot is not None},
    )
    return machine, points


def _launch(device: torch.device) -> Callable[[], object]:
    """A kernel that does nearly nothing; on a GPU one of Triton's, started as those of LoRA are."""
    counter = torch.zeros(1, device=device)
    if device.type != "cuda":
        return lambda: counter.add_(1)
    from bdlora_compile.runtime.kernels.early import count_launch_  # Triton is there on GPUs only

    return lambda: count_launch_(counter)


def _group_sizes() -> list[int]:
    """2, 4, 8, ... and the number of all ranks; none for a single rank."""
    size = dist.get_world_size()
    return sorted({*(2**power for power in range(1, size.bit_length())), size} - {1})


def _collectives(timer: Timer, device: torch.device, settings: Settings, ranks: int) -> list[Point]:
    """Both collectives at every size over the first ``ranks`` ranks; the others wait, and get the same points."""

    def measured(group: dist.ProcessGroup) -> list[Point]:
        points = []
        for kind in _KINDS:
            for payload in settings.sizes:
                seconds = timer.seconds(_collective(kind, payload, ranks, group, device), group)
                points.append(Point(kind, ranks, float(wire_share(kind, ranks)) * payload, seconds))
        return points

    return measure_on_first(ranks, measured)


def _collective(
    kind: CollectiveKind, payload: int, ranks: int, group: dist.ProcessGroup, device: torch.device
) -> Callable[[], Tensor]:
    """The functional collective that compiled graphs hold, on ``payload`` bytes."""
    library = torch.ops._c10d_functional
    gathers = kind == "all_gather_into_tensor"
    operand = torch.zeros(max(payload // 4 // (ranks if gathers else 1), 1), device=device)

    def call() -> Tensor:
        if gathers:
            started = library.all_gather_into_tensor(operand, ranks, group.group_name)
        else:
            started = library.all_reduce(operand, "sum", group.group_name)
        return library.wait_tensor(started)

    return call


def _link(points: Sequence[Point], kind: CollectiveKind, ranks: int) -> Link:
    measured = [(one.wire_bytes, one.seconds) for one in points if (one.kind, one.ranks) == (kind, ranks)]
    return fit_link(measured, f"{kind} over {ranks} ranks")


def _source(device: torch.device, shared: Mapping[int, Symmetric]) -> str:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    how = "CUDA graphs, NCCL" if device.type == "cuda" else f"{torch.get_num_threads()} threads a rank, gloo"
    obstacles = [f"; no symmetric memory on {n} ranks: {one.obstacle}" for n, one in shared.items() if one.obstacle]
    return f"bdlora calibrate, {today}, {_processor(device)}, torch {torch.__version__}, {how}{''.join(obstacles)}"


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores of {platform.machine()}"


def show(machine: Machine, points: Sequence[Point], console: Console) -> None:
    """Print what was measured beside what the fit says."""
    table = Table("constant", "value", title=f"{machine.name}: {machine.source}")
    table.add_row("memory, read and written", f"{machine.memory_bandwidth / 1e9:,.1f} GB/s")
    table.add_row("matrix product", f"{machine.flops / 1e12:,.3f} TFLOP/s")
    table.add_row("a kernel", f"{machine.launch * 1e6:,.2f} us")
    named: dict[str, Mapping[int, Link]] = {
        "all_reduce": machine.all_reduce,
        "all_gather_into_tensor": machine.all_gather,
        "one-shot all_reduce": machine.one_shot,
        "two-shot all_reduce": machine.two_shot,
    }
    for kind, links in named.items():
        for ranks, link in links.items():
            row = f"{link.latency * 1e6:,.1f} us + bytes / {link.bandwidth / 1e9:,.2f} GB/s"
            table.add_row(f"{kind}, {ranks} ranks", row)
    for ranks, found in machine.symmetric.items():
        row = f"one-shot to {found.one_shot:,} bytes, two-shot to {found.two_shot:,}"
        table.add_row(f"all_reduce in symmetric memory, {ranks} ranks", row)
    console.print(table)
    if not points:
        return
    measured = Table("collective", "ranks", "wire bytes", "measured us", "fitted us")
    for one in points:
        fitted = machine.link(one.kind, one.ranks).seconds(one.wire_bytes)
        cells = (f"{one.wire_bytes:,.0f}", f"{one.seconds * 1e6:,.1f}", f"{fitted * 1e6:,.1f}")
        measured.add_row(one.kind, str(one.ranks), *cells)
    console.print(measured)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of one rank's process."""
    parser = argparse.ArgumentParser(prog="bdlora_compile.calibrate", description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    else:
        # Ranks of one machine share its cores.
        torch.set_num_threads(max((os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"]), 1))
    dist.init_process_group("nccl" if is_cuda else "gloo")
    console = Console(quiet=dist.get_rank() != 0)
    try:
        machine, points = measure(device, Settings.choose(device, options.quick), options.name or _processor(device))
    except BdloraError as error:
        Console(stderr=True, quiet=dist.get_rank() != 0).print(f"error: {error}", markup=False, style="red")
        return 2
    finally:
        dist.destroy_process_group()
    show(machine, points, console)
    if options.out is None:
        console.print("--out FILE writes this for --machine and machine=")
    elif not console.quiet:
        options.out.write_text(machine.to_json())
        console.print(f"written to {options.out}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
