"""What the LoRA kernels add to a decoder layer's products, on one GPU: rank 0's shapes of N tensor-parallel ranks.

    python -m benchmarks.bench_lora_kernels --json FILE                 the table, one JSON line a row
    python -m benchmarks.bench_lora_kernels --json FILE --peers DIR     and the peers' kernels in the same run
    python -m benchmarks.bench_lora_kernels --plot FILE [NEWER ...]     a plot beside such a file, as SVG; rows measured
                                                                        again without peers replace those before

DIR is PEERS/peers after ``benchmarks/fetch_peers.sh PEERS``, with PEERS/site on the Python path. The plot needs
matplotlib.

CUDA-graph replays, median of groups. A graph holds several layers, each with weights and adapters of its own, so that
both come from memory and not from the cache. Every case is checked against float64 in the same run.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.lora_layers import Case, Layers, in_processes
from benchmarks.lora_peers import Peers, is_comparable

TARGETS = {
    ("8B", 16, 16): 8, ("8B", 16, 64): 16, ("8B", 64, 16): 9, ("8B", 64, 64): 24,
    ("70B", 16, 16): 11, ("70B", 16, 64): 25, ("70B", 64, 16): 14, ("70B", 64, 64): 42,
}  # fmt: skip
"""What we want block-diagonal LoRA to add at N = 8, in microseconds a layer, by model, r and tokens."""

MAIN = [
    *(Case(m, 8, "bd", r, t, t, t) for m in ("8B", "70B") for r in (16, 64) for t in (16, 64)),
    *(Case("8B", 8, "rep", r, t, t, t) for r in (16, 64) for t in (16, 64)),
    *(Case("8B", 8, kind, r, 2048, 8, 8) for kind in ("bd", "rep") for r in (16, 64)),
    Case("8B", 8, "bd", 16, 16, 1, 1),
    Case("8B", 8, "bd", 16, 16, 1, 64),
    *(Case("8B", 1, "bd", r, t, t, t) for r, t in ((16, 16), (16, 64), (64, 16))),
    Case("8B", 2, "bd", 32, 16, 16, 16, blocks=4),
    Case("8B", 4, "bd", 32, 16, 16, 16, blocks=2),
    Case("8B", 8, "rep", 25, 48, 48, 48),
    Case("8B", 8, "rep", 25, 48, 48, 48, mixed=(2, 8, 64)),
    Case("8B", 8, "bd", 64, 16, 16, 16, dtype="fp16"),
]
SWEEP = [Case("8B", 8, "bd", r, t, min(t, 64), 64) for r in (8, 24, 64, 128) for t in (1, 4, 33, 100, 256)]
TABLE = [*MAIN, *SWEEP]
WITH_VLLM = MAIN[:2]

SHORTEST = 0.2
"""Microseconds that the plot, whose scale is logarithmic, shows for less: LoRA inside a product may cost none."""


def measure(case: Case, peers: Path | None) -> dict[str, Any]:
    """One row: microseconds a layer."""
    layers = Layers(case)
    row = {"device": torch.cuda.get_device_name(), **asdict(case), "error": layers.error()}
    layers.us(False)  # the first graph of a process is faster than the same graph later: 40 us for 44
    base = layers.us(False)
    row |= {"base_us": base, "lora_us": layers.us(True) - base, "floor_us": layers.floor_us()}
    if peers and is_comparable(case):
        others = Peers(layers, peers)
        row |= {"peer_error": others.error(), "peers_us": others.measure(with_vllm=case in WITH_VLLM)}
    return row


def compile_one(job: tuple[Case, int, Path | None]) -> None:
    """Run one group of sites of a case once."""
    case, group, peers = job
    layers = Layers(case, num_layers=1)
    layers.both(0, group)
    if peers and is_comparable(case):
        Peers(layers, peers).compile(group, with_vllm=case in WITH_VLLM)
    torch.cuda.synchronize()


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    base, lora = row["base_us"], row["lora_us"]
    text = (
        f"{row['model']:>4} {row['ranks']:2} {row['kind']:>4} {row['r']:3} {row['tokens']:5} {row['active']:4} "
        f"{row['slots']:4} {row['blocks']:2} {row['dtype']} | {base:6.1f} | {lora:6.1f} | {row['floor_us']:6.1f} "
        f"| {row['error']:.1e}"
    )
    if row["kind"] == "bd" and row["ranks"] == 8 and row["dtype"] == "bf16":
        target = TARGETS.get((row["model"], row["r"], row["tokens"])) if row["active"] == row["tokens"] else None
        text += f" | wanted {target}" if target else ""
    if "peers_us" in row:
        times = row["peers_us"]
        found = ", ".join(f"{name} {us:.1f}" for name, us in times.items())
        text += f" | {lora / min(times.values()):.2f} of the best peer ({found})"
    return text


def plot(file: Path, *newer: Path) -> None:
    """LoRA's time against the best peer's and the byte floor, for the rows that have peers."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for text in "".join(part.read_text() for part in (file, *newer)).splitlines():
        row = json.loads(text)
        case = tuple(str(row[member.name]) for member in fields(Case))
        latest[case] = latest.get(case, {}) | row
    rows = [row for row in latest.values() if "peers_us" in row]
    figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(rows) + 1.2), layout="constrained")
    places = range(len(rows))
    series = {
        "best peer": [min(row["peers_us"].values()) for row in rows],
        "bdlora_compile": [row["lora_us"] for row in rows],
        "byte floor": [row["floor_us"] for row in rows],
    }
    for offset, (name, values) in zip((0.27, 0, -0.27), series.items(), strict=True):
        axes.barh([place + offset for place in places], [max(us, SHORTEST) for us in values], height=0.25, label=name)
    names = [
        f"{r['model']} N={r['ranks']} {r['kind']} r={r['r']}, {r['tokens']} tokens, {r['active']} of {r['slots']}"
        for r in rows
    ]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(left=SHORTEST / 2)
    axes.set_xlabel(f"LoRA adds, microseconds a layer (log scale), {rows[0]['device']}")
    axes.legend()
    figure.savefig(file.with_suffix(".svg"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peers", type=Path, help="the folder that benchmarks/fetch_peers.sh filled")
    parser.add_argument("--plot", type=Path, nargs="+")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so long")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many cases")
    parser.add_argument("--only", type=int, help="stop behind the first so many cases")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if options.plot:
        plot(*options.plot)
        return
    torch.manual_seed(0)
    begin = time.monotonic()
    cases = TABLE[options.skip : options.only]
    if options.workers > 1:
        jobs = [(case, group, options.peers) for case in cases for group in range(4)]
        in_processes(compile_one, jobs, options.workers)
        print(f"compiled in {time.monotonic() - begin:.0f} s")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print("model N kind r tokens active slots c dtype | base us | LoRA us | floor us | error")
    for case in cases:
        if time.monotonic() - begin > options.seconds:
            print(f"time is up before {case}")
            break
        row = {"date": time.strftime("%Y-%m-%d"), **measure(case, options.peers)}
        print(line(row), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
