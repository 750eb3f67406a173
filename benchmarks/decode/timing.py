"""Times of decode steps: on a user's clock, on the GPU's, and by kind of kernel.

Profile last: a process in which torch's profiler was used launches CUDA graphs slower from then on, since CUPTI stays
(https://github.com/pytorch/pytorch/issues/144455).
"""

import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.decode.loops import ROOM, DecodeLoop

STEPS = 24
ROUNDS = 3
PROFILED = 4
"""Steps of a round, rounds, and steps whose profile counts."""
PARTS = ("GEMM", "LoRA", "attention", "collectives", "rest", "idle")
_ORDER = ("GEMM", "attention", "collectives", "rest", "LoRA")
"""Kinds of kernels, the one first to which a moment belongs in which several run."""

_KINDS: Mapping[str, tuple[str, ...]] = {
    "collectives": ("nccl", "one_shot", "two_shot", "all_reduce", "allreduce", "multimem"),
    "attention": ("flash", "fmha", "attention", "sdpa", "softmax"),
    "LoRA": (
        *("apply_tokens", "expand_tokens", "shrink_tokens", "expand_segments", "shrink_segments", "group_tokens"),
        *("shrink_mixed", "delta_tokens", "delta_mixed"),
    ),
    "GEMM": ("gemm", "nvjet", "cutlass", "gemv", "splitk", "_mm_", "dot_kernel"),
}
"""Parts by what names of kernels have in them, in this order."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of a step.

    Attributes:
        step: by the clock, a loop that reads its tokens after every step: the median of rounds, guards and all.
        gpu: of steps launched one behind the other without reading, by the GPU's clock.
        host: that the host needs for a step when it waits for nothing.
        calls: the dozen Python functions that take most of the host's time, themselves.
    """

    step: float
    gpu: float
    host: float
    calls: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """Milliseconds of a step's kernels.

    Attributes:
        parts: by kind of kernel, each moment counted once (`exclusive`); "idle" is what is left of a step's GPU time.
        kernels: the dozen that take most.
    """

    parts: Mapping[str, float]
    kernels: Mapping[str, float]


def measure(loop: DecodeLoop, batch: int, context: int) -> Times:
    """Time a loop's steps; all ranks call it together."""
    assert 2 * STEPS + 8 <= ROOM, "the cache has room for the steps of a round"
    loop.prepare(batch, context)
    loop.run(6, read=True)
    walls, gpus, hosts = [], [], []
    for _ in range(ROUNDS):
        loop.rewind()
        loop.run(3, read=True)
        _align(loop.device)
        start = time.perf_counter()
        loop.run(STEPS, read=True)
        walls.append((time.perf_counter() - start) / STEPS)
        _align(loop.device)
        gpu, host = _pipelined(loop)
        gpus.append(gpu)
        hosts.append(host)
    loop.rewind()
    calls = _calls(lambda: loop.run(STEPS, read=False), STEPS)
    wall, gpu, host = (statistics.median(times) * 1e3 for times in (walls, gpus, hosts))
    return Times(wall, gpu, host, _largest(calls))


def profile_steps(loop: DecodeLoop, batch: int, context: int, gpu: float) -> Profile:
    """The kernels of steps that `measure` has timed, ``gpu`` milliseconds each; on a GPU, all ranks together."""
    loop.prepare(batch, context)
    loop.run(6, read=True)
    _align(loop.device)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        loop.run(1 + PROFILED, read=False)
        torch.cuda.synchronize()
    spans = [
        Span(event.name, event.time_range.start / 1e3, event.time_range.end / 1e3)
        for event in found.events()
        if event.device_type == DeviceType.CUDA
    ]
    spans = behind_first(spans, 1 + PROFILED)
    parts = exclusive(spans, PROFILED)
    return Profile({**parts, "idle": max(gpu - sum(parts.values()), 0.0)}, _largest(_totals(spans, PROFILED)))


def _pipelined(loop: DecodeLoop) -> tuple[float, float]:
    """Seconds of a step by the GPU's clock and by the host's, launched without waiting."""
    if loop.device.type != "cuda":
        start = time.perf_counter()
        loop.run(STEPS, read=False)
        seconds = (time.perf_counter() - start) / STEPS
        return seconds, seconds
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    start = time.perf_counter()
    loop.run(2, read=False)
    host = (time.perf_counter() - start) / 2
    loop.run(STEPS - 2, read=False)
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / STEPS / 1e3, host


class Span(NamedTuple):
    """When a kernel ran, in milliseconds of the GPU's clock."""

    name: str
    start: float
    end: float


def behind_first(spans: Sequence[Span], steps: int) -> list[Span]:
    """Those of all steps but the first, in which ranks wait for the one that begins last; all have equally many."""
    return sorted(spans, key=lambda span: span.start)[len(spans) // steps :]


def _totals(spans: Sequence[Span], steps: int) -> dict[str, float]:
    """Milliseconds of each kernel in one of so many steps, also of those that run beside others."""
    totals: dict[str, float] = {}
    for span in spans:
        totals[span.name] = totals.get(span.name, 0.0) + (span.end - span.start) / steps
    return totals


def exclusive(spans: Sequence[Span], steps: int) -> dict[str, float]:
    """Milliseconds of one of so many steps by kind of kernel, in which none of a kind ahead of it in ``_ORDER`` runs.

    So LoRA's are those that nothing else hides, and the sum is the time in which any kernel runs.
    """
    changes = [(span.start, 1, kind_of(span.name)) for span in spans]
    changes += [(span.end, -1, kind_of(span.name)) for span in spans]
    parts, running, before = dict.fromkeys(PARTS[:-1], 0.0), dict.fromkeys(_ORDER, 0), 0.0
    for at, change, kind in sorted(changes):
        first = next((kind for kind in _ORDER if running[kind]), None)
        if first is not None:
            parts[first] += (at - before) / steps
        running[kind] += change
        before = at
    return parts


def _calls(launch: Callable[[], None], times: int) -> dict[str, float]:
    """Milliseconds of the host in each Python function, in one of so many that ``launch`` starts."""
    profiler = cProfile.Profile()
    profiler.runcall(launch)
    found: Any = pstats.Stats(profiler)
    return {
        f"{Path(file).name}:{line} {name}": own / times * 1e3
        for (file, line, name), (_, _, own, _, _) in found.stats.items()
    }


def _largest(times: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda item: -item[1])[:12])


def kind_of(kernel: str) -> str:
    """The part that a kernel belongs to."""
    name = kernel.lower()
    for kind, words in _KINDS.items():
        if any(word.lower() in name for word in words):
            return kind
    return "rest"


def prefill_times(loop: DecodeLoop, batch: int, length: int) -> Times:
    """Time a forward over prompts of ``length`` tokens; step and gpu are one here."""
    ids = torch.randint(5, 1000, (batch, length), generator=torch.Generator().manual_seed(3)).to(loop.device)
    positions = torch.arange(length, device=loop.device).expand(batch, length).contiguous()
    loop.prepare(batch, length)

    def forward() -> None:
        loop.cache.reset()
        loop.prefill(ids, positions)[:, -1, 0].tolist()

    walls = []
    for _ in range(5):
        _align(loop.device)
        start = time.perf_counter()
        forward()
        walls.append(time.perf_counter() - start)
    wall = statistics.median(walls[1:]) * 1e3
    calls = _calls(forward, 1)
    return Times(wall, wall, sum(calls.values()), _largest(calls))


def _align(device: torch.device) -> None:
    """All ranks are here, and their GPUs have nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized() and dist.get_backend() != "fake":
        dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
