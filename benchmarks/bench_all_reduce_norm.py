"""All-reduce, residual addition and norm: one kernel against an all-reduce and what Inductor makes of the rest.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.bench_all_reduce_norm --json FILE

First the operator that served graphs call is replayed a thousand times with data that change, with rows that come and
go, without and with a delta, ordinary all-reduces of all kinds between the calls, and ranks that are late in turn.
Every sum must be right to the bit, every norm within rounding, and all ranks must have the same bits. Then microseconds
of one call in a chain (median of groups, the slowest rank). A part that takes longer than `LIMIT` seconds ends the
process: a rank that waits for another waits for ever.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bdlora_compile.runtime.all_reduce import all_reduce, new_mailbox
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.runtime.norm_op import all_reduce_add_norm
from benchmarks.bench_all_reduce import joined, pair_us, shared_buffer, summand
from benchmarks.replays import captured

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
COLUMNS = 4096
REPLAYS = 1000
ONE_SHOT, TWO_SHOT = 1 << 20, 1 << 24
"""What the machine file of two H100s says."""
EPSILON = 1e-5
LIMIT = 40.0
CALLS = (
    *((1, 4096), (16, 4096), (3, 4096), (16, 4096), (128, 4096)),
    *((1, 8192), (64, 8192), (2, 512), (16, 4096), (256, 4096)),
)
"""Rows and columns of the calls of one replay; the last is too large for the kernel."""


class TimeLimit:
    """Ends the process if a part of the work is not over in `LIMIT` seconds."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def begin(self, part: str) -> None:
        """The part before is over; an empty name ends the watch."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(LIMIT, self._end, (part,))
        self._timer.daemon = True
        if part:
            self._timer.start()

    def _end(self, part: str) -> None:
        print(f"rank {os.environ['LOCAL_RANK']}: {part} not over after {LIMIT:g} s", file=sys.stderr, flush=True)
        os._exit(1)


def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(residual + x, its norm), as transformers' layers have it."""
    total = residual + x
    exact = total.float()
    scaled = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + EPSILON)
    return total, weight * scaled.to(x.dtype)


class Ranks:
    """This rank's memory, and the ways to call."""

    def __init__(self) -> None:
        self.buffer, self.group = shared_buffer(TWO_SHOT)
        self.mailbox = new_mailbox(self.group, torch.device("cuda", torch.cuda.current_device()))
        dist.barrier()
        self._compiled = torch.compile(add_and_norm, dynamic=True)

    def fused(self, x: Tensor, residual: Tensor, weight: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """By one operator; with a delta it adds to x what that lacks."""
        exchange = (self.buffer, self.mailbox, EPSILON, ONE_SHOT, TWO_SHOT, self.group)
        return all_reduce_add_norm(x, residual, weight, *exchange, delta)

    def apart(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """By an all-reduce and what Inductor makes of the rest."""
        reduced = all_reduce(x, self.buffer, ONE_SHOT, TWO_SHOT, self.group)
        total, normed = self._compiled(reduced, residual, weight)
        return total, normed


def check(ranks: Ranks) -> dict[str, int]:
    """Elements that were wrong in a thousand replays, on any rank; and ranks whose bits differ."""
    rank, size = dist.get_rank(), dist.get_world_size()
    step, sums, norms, digest = (torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(4))
    ways = [(ONE_SHOT, TWO_SHOT), (0, TWO_SHOT), (0, 0)]

    def values(rows: int, columns: int, turn: int, of: int) -> Tensor:
        return summand(2 * rows * columns, of, step + turn).view(rows, columns)

    def summed(rows: int, columns: int, turn: int) -> Tensor:
        """Integers of at most 15 times the ranks: exact in bf16."""
        return sum((values(rows, columns, turn, of).float() for of in range(size)), torch.zeros((), device="cuda"))

    def missing(rows: int, columns: int, turn: int, of: int) -> Tensor:
        """With it a rank's x are integers of at most 30: their sum over eight ranks is exact in bf16, too."""
        return values(rows, columns, turn, size + 1 + of)

    def delta_of(rows: int, columns: int, turn: int) -> Tensor:
        """This rank's, NaN behind the rows; all of it is NaN for more than few tokens, as nobody reads it."""
        delta = torch.full((BY_TOKEN_LIMIT, columns), float("nan"), device="cuda", dtype=torch.bfloat16)
        if rows <= BY_TOKEN_LIMIT:
            delta[:rows] = missing(rows, columns, turn, rank)
        return delta

    def completed(rows: int, columns: int, turn: int) -> Tensor:
        """The sum with what the ranks' x lack."""
        total = summed(rows, columns, turn)
        if rows <= BY_TOKEN_LIMIT:
            total += sum(missing(rows, columns, turn, of).float() for of in range(size))
        return total

    def run() -> None:
        for turn, (rows, columns) in enumerate(CALLS):
            if turn % size == rank:
                torch.cuda._sleep(20000)
            residual = values(rows, columns, turn, size)
            weight = torch.linspace(0.5, 2, columns, device="cuda").to(torch.bfloat16)
            own = values(rows, columns, turn, rank)
            for delta, sum_of in ((None, summed), (delta_of(rows, columns, turn), completed)):
                total, normed = ranks.fused(own, residual, weight, delta)
                reduced = sum_of(rows, columns, turn).to(torch.bfloat16)
                right, right_norm = add_and_norm(reduced, residual, weight)
                sums.add_((total != right).sum())
                # One rounding to bf16 more or less, before the weight and after it; NaN is wrong, too.
                norms.add_((~((normed - right_norm).abs() <= 2.0**-6 * right_norm.abs())).sum())
                digest.mul_(31).add_(normed.view(torch.int16).to(torch.int64).sum())
            if turn % 2:
                found = all_reduce(own, ranks.buffer, *ways[turn % 3], ranks.group)
                sums.add_((found.float() != summed(rows, columns, turn)).sum())
        step.add_(1)

    replay = captured(run)
    for counter in (sums, norms, digest):
        counter.zero_()
    for _ in range(REPLAYS):
        replay()
    torch.cuda.synchronize()
    weight = torch.ones(COLUMNS, device="cuda", dtype=torch.bfloat16)
    few = delta_of(BY_TOKEN_LIMIT, COLUMNS, 0)
    twins = (
        (128, None, summed(128, COLUMNS, 1)),
        (BY_TOKEN_LIMIT, few, completed(BY_TOKEN_LIMIT, COLUMNS, 1)),
        (BY_TOKEN_LIMIT, few, summed(BY_TOKEN_LIMIT, COLUMNS, 0)),
    )
    for rows, delta, twin in twins:
        residual = values(rows, COLUMNS, 0, size)
        total, _ = ranks.fused(values(rows, COLUMNS, 0, rank), residual, weight, delta)
        assert bool((total != twin.to(torch.bfloat16) + residual).any()), "of another turn, or without delta"
    least = digest.clone()
    dist.all_reduce(digest, op=dist.ReduceOp.MAX)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    for counter in (sums, norms):
        dist.all_reduce(counter)
    counts = {"wrong_sums": int(sums), "wrong_norms": int(norms)}
    return {"replays": REPLAYS, **counts, "ranks_differ": int(digest != least)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, then measure all sizes."""
    file = joined(__doc__, arguments)
    limit = TimeLimit()
    limit.begin("the check")
    ranks = Ranks()
    lines: list[dict[str, Any]] = [dict(check(ranks))]
    tell(lines[0])
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "ranks": dist.get_world_size()}
    weight = torch.ones(COLUMNS, device="cuda", dtype=torch.bfloat16)
    limit.begin("compiling")
    ranks.apart(*torch.zeros(2, 16, COLUMNS, device="cuda", dtype=torch.bfloat16).unbind(), weight)
    torch.cuda.synchronize()
    ways: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"apart": ranks.apart, "fused": ranks.fused}
    for tokens in TOKENS:
        limit.begin(f"{tokens} tokens")
        pair = torch.zeros(2, tokens, COLUMNS, device="cuda", dtype=torch.bfloat16).unbind()
        line = {**about, "tokens": tokens, "bytes": pair[0].nbytes}
        line |= {f"{name}_us": pair_us(lambda x, r, way=way: way(x, r, weight), *pair) for name, way in ways.items()}
        tell({key: value for key, value in line.items() if key not in about})
        lines.append(line)
    limit.begin("")
    if dist.get_rank() == 0:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dist.destroy_process_group()


def tell(line: dict[str, Any]) -> None:
    """A line on rank 0's screen."""
    if dist.get_rank() == 0:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
