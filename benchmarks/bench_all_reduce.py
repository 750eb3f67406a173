"""All-reduces of the sizes of decode and of prompts, in CUDA graphs: NCCL against symmetric memory.

    torchrun --nproc-per-node N -m benchmarks.bench_all_reduce --json FILE

First the operator that served graphs call is replayed a thousand times with data that change, all three ways over one
buffer and with ranks that are late in turn; every element must be right. Then microseconds of one all-reduce in a chain
(median of groups, the slowest rank), and of the copy that two-shot needs. The last line is what belongs into the
machine's file.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bdlora_compile.calibrate_symmetric import WAYS, fastest_limits
from bdlora_compile.runtime.all_reduce import all_reduce, symmetric_buffer
from benchmarks.replays import captured

SIZES = [1 << power for power in range(13, 25)]
"""Bytes: one token of 8B's hidden states in bf16, to 2,048 of them."""
CHAIN, REPLAYS = 20, 1000
BUFFER = SIZES[-1]


def summand(size: int, rank: int, step: Tensor) -> Tensor:
    """bf16 [size / 2] of small integers, so that sums are exact; others in each step and on each rank."""
    index = torch.arange(size // 2, device="cuda")
    return ((index * 7 + rank * 13 + step * 5) % 31 - 15).to(torch.bfloat16)


def check(buffer: Tensor, group: str) -> int:
    """Elements that were wrong in a thousand replays, on any rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    ways = [(64 << 20, 0), (0, 64 << 20), (0, 0)]

    def run() -> None:
        for turn, size in enumerate((8192, 1 << 20, 8192, 8192, 131072, 8192, 1 << 18, 8192, 8192)):
            if turn % ranks == rank:
                torch.cuda._sleep(20000)
            found = all_reduce(summand(size, rank, step + turn), buffer, *ways[turn % 3], group)
            expected = sum(summand(size, other, step + turn).float() for other in range(ranks))
            wrong.add_((found.float() != expected).sum())
        step.add_(1)

    replay = captured(run)
    wrong.zero_()
    for _ in range(REPLAYS):
        replay()
    torch.cuda.synchronize()
    dist.all_reduce(wrong)
    twin = all_reduce(summand(8192, rank, step), buffer, BUFFER, 0, group)
    other = sum(summand(8192, peer, step + 1).float() for peer in range(ranks))
    assert bool((twin.float() != other).any()), "the twin of another step must differ"
    return int(wrong)


def us(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Microseconds of a call in a chain of them, on the slowest rank."""
    return pair_us(lambda value, other: (other, call(value)), x, x)


def pair_us(call: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, other: Tensor) -> float:
    """The same for a call of (x, other) that returns (other, x) for the next one."""

    def chain() -> None:
        value, beside = x, other
        for _ in range(CHAIN):
            beside, value = call(value, beside)

    replay = captured(chain)
    times = []
    for _ in range(9):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (5 * CHAIN))
    worst = torch.tensor(statistics.median(times), device="cuda")
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return round(worst.item(), 2)


def limits(lines: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Up to which size each way through symmetric memory is the fastest of the three."""
    return asdict(fastest_limits({line["bytes"]: {way: line[f"{way}_us"] for way in WAYS} for line in lines}))


def joined(description: str | None, arguments: Sequence[str] | None) -> Path:
    """Read the command line and join torchrun's process group; returns the file that --json names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    file: Path = parser.parse_args(arguments).json
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    return file


def shared_buffer(size: int) -> tuple[Tensor, Any]:
    """Symmetric memory of all ranks, uint8 [size], and the name of their group."""
    assert dist.group.WORLD is not None, "initialized by `joined`"
    group = dist.group.WORLD.group_name
    return symmetric_buffer(size, group, torch.device("cuda", torch.cuda.current_device())), group


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, then measure all sizes."""
    file = joined(__doc__, arguments)
    buffer, group = shared_buffer(BUFFER)
    lines: list[dict[str, Any]] = [{"replays": REPLAYS, "wrong_elements": check(buffer, group)}]
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "ranks": dist.get_world_size()}
    for size in SIZES:
        x = torch.zeros(size // 2, device="cuda", dtype=torch.bfloat16)
        line = {**about, "bytes": size}
        for way, bounds in {"nccl": (0, 0), "one_shot": (BUFFER, 0), "two_shot": (0, BUFFER)}.items():
            line[f"{way}_us"] = us(lambda value, bounds=bounds: all_reduce(value, buffer, *bounds, group), x)
        line["copy_us"] = us(torch.clone, x)
        lines.append(line)
    lines.append({**about, "symmetric": limits(lines[1:])})
    if dist.get_rank() == 0:
        for line in lines:
            print(json.dumps(line), flush=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
