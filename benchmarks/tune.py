"""Find plans and tile sizes for the LoRA kernels on this GPU, and write them into the package's table.

    python -m benchmarks.tune --rows FILE               measure; one JSON line for each plan tried
    python -m benchmarks.tune --table FILE [FILE ...]   write runtime/kernels/tuned.py from such files

A plan's time is that of a whole layer, products and LoRA behind them on all sites, with the plan for one group of sites
and the table's for the others: weights and factors come from memory as in use. Each plan is also checked against
float64. Where several files have plans of one shape, the table takes the last one's.
"""

import argparse
import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from bdlora_compile.runtime.kernels import launch
from bdlora_compile.runtime.kernels.tiles import (
    NARROW,
    Expand,
    OneLaunch,
    Plan,
    Shrink,
    TwoLaunches,
    can_overlap,
    segment_tokens,
)
from benchmarks.lora_layers import Case, Layers, groups_of, in_processes
from benchmarks.plan_table import TABLE, fields_of, table

CASES = [
    *(Case(m, 8, "bd", r, t, t, t) for t in (16, 64) for m in ("8B", "70B") for r in (16, 64)),
    *(Case("8B", 8, "rep", r, t, t, t) for t in (16, 64) for r in (16, 64)),
    *(Case("8B", 8, k, r, 2048, 8, 8) for k in ("bd", "rep") for r in (16, 64)),
    *(Case("8B", 8, "bd", r, 256, 64, 64) for r in (8, 16, 32, 64, 128)),
    *(Case("8B", n, "bd", 32, t, t, t, blocks=8 // n) for n in (2, 4) for t in (16, 64)),
]


def one_launches(case: Case, in_features: int) -> list[Plan]:
    """Plans of one launch."""
    if case.width > NARROW or case.tokens > 256:
        return []
    rows = max(2, 1 << (case.width - 1).bit_length())
    warps = (2, 4) if in_features <= 1024 else (8, 16) if in_features >= 8192 else (4, 8)
    registers = (0, 128) if case.tokens > 16 else (0,)
    return [OneLaunch(rows, *rest) for rest in itertools.product(warps, (True, False), registers)]


def shrinks(case: Case) -> list[Shrink]:
    """Shrinks of two launches."""
    if segment_tokens(case.tokens) == 0:
        return [
            Shrink(8, 2048, 4), Shrink(8, 1024, 4), Shrink(8, 2048, 8), Shrink(16, 1024, 8), Shrink(4, 4096, 8),
            Shrink(16, 512, 4), Shrink(4, 2048, 4),
        ]  # fmt: skip
    if case.tokens <= 256:
        return [
            Shrink(16, 256, 4, 4, 3), Shrink(32, 256, 4, 2, 3), Shrink(16, 256, 4, 1, 4), Shrink(32, 128, 4, 4, 4),
            Shrink(16, 512, 4, 2, 2), Shrink(16, 512, 4, 8, 1), Shrink(16, 256, 2, 4, 3), Shrink(16, 256, 4, 2, 4),
        ]  # fmt: skip
    narrow = [
        Shrink(32, 128, 4, 4, 4), Shrink(32, 128, 4, 2, 4), Shrink(32, 128, 4, 1, 4), Shrink(32, 128, 8, 4, 4),
        Shrink(32, 256, 8, 4, 2), Shrink(32, 64, 4, 2, 6), Shrink(32, 128, 4, 4, 2), Shrink(32, 64, 4, 4, 3),
    ]  # fmt: skip
    wide = [
        Shrink(64, 64, 4, 2, 4), Shrink(64, 64, 4, 1, 6), Shrink(64, 64, 4, 4, 4), Shrink(64, 128, 8, 2, 3),
        Shrink(128, 64, 4, 2, 4), Shrink(128, 64, 8, 2, 4), Shrink(128, 64, 8, 4, 4), Shrink(64, 64, 4, 4, 2),
        Shrink(128, 64, 8, 4, 2),
    ]  # fmt: skip
    return wide if case.width > 16 else narrow


def expands(case: Case) -> list[Expand]:
    """Expands of two launches; fewer registers where more programs then fit a multiprocessor and nothing spills."""
    width = 1 << (case.width - 1).bit_length()
    if segment_tokens(case.tokens) == 0:
        wide = Expand(min(width, 64), 128, 4)
        return [
            wide, Expand(8, 1024, 4), Expand(16, 1024, 4), Expand(16, 512, 4), Expand(16, 512, 2), Expand(16, 256, 2),
            Expand(16, 1024, 8), Expand(8, 512, 4), Expand(16, 1024, 4, registers=128),
            Expand(16, 512, 2, registers=128), Expand(4, 1024, 4),
        ]  # fmt: skip
    rows = max(16, min(width, 64))
    if case.tokens <= 256:
        sizes = ((64, 2, 4), (128, 4, 1), (128, 4, 4), (256, 4, 1), (256, 8, 1), (512, 8, 1), (128, 2, 2))
        return [Expand(rows, columns, warps, repeat) for columns, warps, repeat in sizes]
    return [
        Expand(rows, columns, 4, repeat) for columns, repeat in ((64, 4), (64, 8), (128, 1), (128, 4), (64, 1), (64, 2))
    ]


def run_piece(layers: Layers, group: int, piece: Plan | Shrink | Expand, planes: int) -> None:
    """One launch of a part of a plan, so that it is compiled."""
    factors, case = layers.factors(0, group), layers.case
    if isinstance(piece, Shrink):
        launch.shrink(layers.x[group], factors, layers.work, case.width, piece, overlap=can_overlap())
    elif isinstance(piece, Expand):
        h = torch.zeros(planes, case.tokens, len(factors.sites), case.width, device="cuda")
        outs = layers.groups[group].out_features
        launch.expand(layers.y[group], h, factors, layers.scales, layers.work, outs, 1, piece, overlap=can_overlap())
    else:
        layers.lora(0, group, piece)


def pieces(case: Case) -> list[tuple[Plan | Shrink | Expand, int, int]]:
    """(piece, group, planes of h) of all plans of a case."""
    found: list[tuple[Plan | Shrink | Expand, int, int]] = []
    for number, group in enumerate(groups_of(case)):
        ones = one_launches(case, group.in_features)
        found += [(plan, number, 1) for plan in ones]
        if not ones or case.tokens > 64:
            planes = {planes_of(shrink, case, group.in_features) for shrink in shrinks(case)}
            found += [(shrink, number, 1) for shrink in shrinks(case)]
            found += [(expand, number, count) for expand in expands(case) for count in planes if count <= 4]
    return found


def planes_of(shrink: Shrink, case: Case, in_features: int) -> int:
    """Planes of h that a shrink leaves."""
    return shrink.splits if segment_tokens(case.tokens) else -(-in_features // shrink.depth)


Job = tuple[Case, Plan | Shrink | Expand, int, int]


def jobs(cases: Sequence[Case]) -> list[Job]:
    """What has to be compiled, each kernel once: (case, piece, group, planes of h)."""
    found: dict[object, Job] = {}
    for case in cases:
        for piece, group, planes in pieces(case):
            sizes = groups_of(case)[group] if isinstance(piece, OneLaunch) else case.width % 16 == 0
            found[piece, planes, segment_tokens(case.tokens), sizes] = (case, piece, group, planes)
    return [*found.values()]


def compile_one(job: Job) -> None:
    """Run a piece once."""
    case, piece, group, planes = job
    layers = Layers(case, num_layers=1)
    with contextlib.suppress(OutOfResources):
        run_piece(layers, group, piece, planes)
    torch.cuda.synchronize()


def measure(case: Case) -> Iterator[dict[str, Any]]:
    """Every plan of every group of sites of a case."""
    layers = Layers(case)
    base = layers.us(False)
    for group in range(len(layers.groups)):

        def tried(plan: Plan, group: int = group) -> dict[str, Any] | None:
            try:
                error = layers.group_error(group, plan)
                us = layers.us(True, {group: plan}) - base
            except OutOfResources:
                return None
            call = layers.call(group)
            return {
                "device": torch.cuda.get_device_name(),
                **asdict(call),
                "plan": fields_of(plan),
                "us": us,
                "error": error,
            }

        in_features = layers.groups[group].in_features
        ones = one_launches(case, in_features)
        found = [row for plan in ones if (row := tried(plan))]
        if not ones or case.tokens > 64:
            first = [(row, shrink) for shrink in shrinks(case) if (row := tried(TwoLaunches(shrink, expands(case)[1])))]
            best = min(first, key=lambda pair: pair[0]["us"])[1]
            found += [row for row, _ in first]
            found += [row for expand in expands(case) if (row := tried(TwoLaunches(best, expand)))]
        yield from found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tokens", type=int, nargs="+", help="only cases of these numbers of tokens")
    parser.add_argument("--ranks", type=int, nargs="+", help="only cases of these numbers of ranks")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so long")
    options = parser.parse_args(arguments)
    if options.table:
        files = [[json.loads(line) for line in file.read_text().splitlines()] for file in options.table]
        TABLE.write_text(table(files))
        return
    begin = time.monotonic()
    cases = [
        case
        for case in CASES
        if (not options.tokens or case.tokens in options.tokens) and (not options.ranks or case.ranks in options.ranks)
    ]
    if options.workers > 1:
        in_processes(compile_one, jobs(cases), options.workers)
        print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    with options.rows.open("w") as file:
        for case in cases:
            if time.monotonic() - begin > options.seconds:
                print(f"time is up before {case}")
                break
            for row in measure(case):
                file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{time.monotonic() - begin:.0f} s: {case}", flush=True)


if __name__ == "__main__":
    main()
