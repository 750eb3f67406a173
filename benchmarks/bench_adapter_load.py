"""What loading an adapter costs the steps that run meanwhile: a 70B-shaped adapter, this rank of 8, on one GPU.

    python -m benchmarks.bench_adapter_load                   Llama-3.1-70B's shapes, rank 64, both kinds
    python -m benchmarks.bench_adapter_load --device cpu --layers 2 --hidden 256 --steps 20     only to see it run

A step is the linear layers and LoRA sites of all layers for 16 tokens with weights of one rank of 8 (no attention, no
collectives), replayed from a CUDA graph. Meanwhile adapters are uploaded from pinned memory into a slot that no token
uses, as `AdapterSet` does it. Printed: times of quiet steps and of steps beside uploads, the upload's bandwidth against
a plain copy's from pinned memory, and what choosing another resident adapter costs. The targets are 10 %, 80 % and
nothing that can be measured.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from torch import Tensor

from bdlora_compile.factors import Layout, LocalFactors, local_features, local_shape
from bdlora_compile.placement import Mesh
from bdlora_compile.runtime.adapter_file import FactorKind, LoraFactors
from bdlora_compile.runtime.adapter_tensors import MemoryTensor
from bdlora_compile.runtime.bank import AdapterBank, StagedAdapter, chunk_elements
from bdlora_compile.runtime.copier import copier_for
from bdlora_compile.runtime.ops import lora_apply_, lora_work
from bdlora_compile.sites import Role, Site
from benchmarks.replays import captured

MESH = Mesh(8)
TOKENS = 16
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Sites that read one x: one base product and one LoRA call each."""


def sites_of_layer(hidden: int) -> dict[str, Site]:
    """The sites of a Llama-3.1-70B layer, or of one with its proportions."""
    head, intermediate = hidden // 64, hidden * 7 // 2
    shapes = {
        "q": (Role.COLUMN, hidden, hidden, head),
        "k": (Role.COLUMN, hidden, hidden // 8, head),
        "v": (Role.COLUMN, hidden, hidden // 8, head),
        "o": (Role.ROW, hidden, hidden, head),
        "gate": (Role.COLUMN, hidden, intermediate, 1),
        "up": (Role.COLUMN, hidden, intermediate, 1),
        "down": (Role.ROW, intermediate, hidden, 1),
    }
    return {name: Site(name, *shape) for name, shape in shapes.items()}


@dataclass
class Machine:
    """Weights of one rank, its bank, and the step."""

    device: torch.device
    bank: AdapterBank
    weights: list[Tensor]
    sites: dict[str, Site]
    layers: int
    rank: int

    def step(self, x: dict[str, Tensor]) -> None:
        """All layers' products and LoRA sites; every call works on the same inputs, which the times do not care for."""
        bank, order = self.bank, list(self.sites)
        weights = iter(self.weights)
        for layer in range(self.layers):
            rows = slice(layer * len(order), (layer + 1) * len(order))
            for group in GROUPS:
                own = x[group[0]]
                y = own @ next(weights)
                work = lora_work(own, bank.token_slot)
                places = [order.index(name) for name in group]
                out = [local_features(self.sites[name], Layout.LOCAL, MESH)[1] for name in group]
                tables = (bank.pool, bank.slots[rows], bank.scales[rows], bank.token_slot)
                lora_apply_(own, y, *tables, *work, places, self.rank, out)


def build(options: argparse.Namespace, nblocks: int) -> tuple[Machine, StagedAdapter]:
    """A rank with random weights, room for three adapters, and one of them in host memory."""
    device = torch.device(options.device)
    sites = sites_of_layer(options.hidden)
    names = [f"{layer}.{name}" for layer in range(options.layers) for name in sites]
    shapes = {name: _shape(site, options.rank, nblocks) for name, site in sites.items()}
    size = options.layers * chunk_elements(list(shapes.values()))
    bank = AdapterBank(names, 4, 3 * size, TOKENS, torch.bfloat16, device, copier_for(device))
    factors = {}
    for name in names:
        shape = shapes[name.partition(".")[2]]
        a = torch.randn(shape.a_rank, shape.in_features // shape.a_blocks, dtype=torch.bfloat16)
        b = torch.randn(shape.b_rank, shape.out_features // shape.b_blocks, dtype=torch.bfloat16)
        factors[name] = (LocalFactors(shape, a, b), 1.0)
    weights = []
    for _ in range(options.layers):
        for group in GROUPS:
            features = [local_features(sites[name], Layout.LOCAL, MESH) for name in group]
            shape_of_group = (features[0][0], sum(out for _, out in features))
            weights.append(torch.randn(shape_of_group, dtype=torch.bfloat16, device=device) * 0.01)
    return Machine(device, bank, weights, sites, options.layers, options.rank), bank.stage(factors)


def _shape(site: Site, rank: int, nblocks: int) -> Any:
    kind = FactorKind.DENSE
    if nblocks > 1:
        kind = FactorKind.BLOCK_B if site.role is Role.COLUMN else FactorKind.BLOCK_A
    nothing = MemoryTensor("sizing", torch.empty(0, 0), "sizing")
    factors = LoraFactors(site.name, kind, rank, nblocks, 1.0, nothing, nothing)
    return local_shape(factors, site, Layout.LOCAL, 0, MESH)


def step_of(machine: Machine) -> Callable[[], None]:
    """The step as a CUDA graph; as it is on a CPU."""
    inputs = {
        group[0]: torch.randn(
            TOKENS, local_features(machine.sites[group[0]], Layout.LOCAL, MESH)[0], dtype=torch.bfloat16
        ).to(machine.device)
        for group in GROUPS
    }
    machine.step(inputs)
    if machine.device.type == "cpu":
        return lambda: machine.step(inputs)
    return captured(lambda: machine.step(inputs), warm_up=1)


class Clock:
    """Milliseconds between marks in the order of the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def between(self) -> list[float]:
        """Times between neighbouring marks; waits for the last."""
        pairs = list(zip(self._marks[:-1], self._marks[1:], strict=True))
        if not self._is_cuda:
            return [1e3 * (second - first) for first, second in pairs]
        self._marks[-1].synchronize()
        return [float(first.elapsed_time(second)) for first, second in pairs]


def plain_bandwidth(machine: Machine, staged: StagedAdapter) -> float:
    """GB/s of a copy of the same bytes from pinned memory, alone; the best of five."""
    target = torch.empty_like(staged.chunk, device=machine.device)
    clock = Clock(machine.device)
    for _ in range(6):
        clock.mark()
        target.copy_(staged.chunk, non_blocking=True)
    clock.mark()
    return staged.chunk.nbytes / min(clock.between()[1:]) / 1e6


def run(options: argparse.Namespace, nblocks: int) -> dict[str, Any]:
    """Measure one kind of adapter."""
    machine, staged = build(options, nblocks)
    bank, size = machine.bank, staged.chunk.numel()
    for slot in range(2):
        bank.write(slot, staged, slot * size)
    bank.token_slot.copy_(torch.arange(TOKENS, dtype=torch.int32) % 2)
    bank.before_step([0, 1])
    replay = step_of(machine)
    bandwidth = plain_bandwidth(machine, staged)

    def steps(upload: bool, switch: bool) -> tuple[list[float], list[float]]:
        clock, uploads = Clock(machine.device), []
        clock.mark()
        for step in range(options.steps):
            if upload and step % 10 == 5:
                if step > 5:
                    bank.clear(2)
                uploads.append(_timed_upload(machine, staged, 2 * size))
            if switch:
                bank.token_slot.fill_(step % 2)
            bank.before_step([0, 1])
            replay()
            clock.mark()
        times = clock.between()
        if uploads:
            bank.clear(2)
        return times, [own() for own in uploads]

    steps(False, False)
    quiet, _ = steps(False, False)
    beside, uploads = steps(True, False)
    switching, _ = steps(False, True)
    again, _ = steps(False, False)
    base = statistics.median([*quiet, *again])
    reached = staged.chunk.nbytes / statistics.median(uploads) / 1e6
    return {
        "nblocks": nblocks,
        "rank": options.rank,
        "megabytes": round(staged.chunk.nbytes / 1e6, 1),
        "quiet_ms": round(base, 3),
        "quiet_worst_ms": round(max(*quiet, *again), 3),
        "beside_uploads_ms": round(statistics.median(beside), 3),
        "beside_uploads_worst_ms": round(max(beside), 3),
        "worst_step_ratio": round(max(beside) / base, 3),
        "upload_gb_per_s": round(reached, 2),
        "plain_copy_gb_per_s": round(bandwidth, 2),
        "share_of_bandwidth": round(reached / bandwidth, 3),
        "switching_ms": round(statistics.median(switching), 3),
    }


def _timed_upload(machine: Machine, staged: StagedAdapter, start: int) -> Callable[[], float]:
    """Begin an upload; milliseconds that it took, to be asked for when it is over.

    The copier's own stream is timed around it: an upload first waits for the steps before it, which is not its time.
    """
    bank = machine.bank
    if machine.device.type == "cpu":
        began = time.perf_counter()
        bank.write(2, staged, start)
        taken = 1e3 * (time.perf_counter() - began)
        return lambda: taken
    stream = bank._copier._uploads  # type: ignore[attr-defined]  # of `StreamCopier`
    stream.wait_stream(torch.cuda.current_stream())
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record(stream)
    bank.write(2, staged, start)
    last.record(stream)

    def taken_ms() -> float:
        last.synchronize()
        return float(first.elapsed_time(last))

    return taken_ms


def main() -> None:
    """Measure both kinds; a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see it run")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200, help="at least 6: the first upload is beside the sixth")
    options = parser.parse_args()
    on = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{date.today()}, {on}, torch {torch.__version__}")
    for nblocks in (8, 1):
        print(json.dumps(run(options, nblocks)), flush=True)


if __name__ == "__main__":
    main()
