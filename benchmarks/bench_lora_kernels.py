"""What the LoRA kernels add to a decoder layer's products, on one GPU: rank 0's shapes of N tensor-parallel ranks.

    python benchmarks/bench_lora_kernels.py                 the table
    python benchmarks/bench_lora_kernels.py --tune          tile sizes for each site, the best first
    python benchmarks/bench_lora_kernels.py --json FILE     the rows as JSON lines

CUDA-graph replays, median of groups. A graph holds several layers, each with weights and adapters of its own, so that
both come from memory and not from the cache. Every case is checked against float64 in the same run.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bdlora_compile.runtime.kernels import launch
from bdlora_compile.runtime.kernels.tiles import ApplyTiles, Tiles, apply_tiles_for
from bdlora_compile.runtime.ops import SlotField

BANDWIDTH = 3.0e12
"""Bytes a second of a large copy on an H100 (read plus write): what the floor divides by."""


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama."""

    name: str
    hidden: int
    kv: int
    intermediate: int
    layers: int
    """Layers in one graph: enough that their weights exceed the cache many times."""


MODELS = {
    "8B": Model("8B", 4096, 1024, 14336, 8),
    "70B": Model("70B", 8192, 1024, 28672, 4),
}


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        kind: "bd": every local rank is r / N. "rep": every local rank is r.
        active: distinct adapters in the batch.
        slots: adapters held.
        blocks: c, packed blocks of the factor that is cut (bd only).
    """

    model: str
    ranks: int
    kind: str
    r: int
    tokens: int
    active: int
    slots: int
    blocks: int = 1

    @property
    def local_rank(self) -> int:
        """Rank of every factor on this rank."""
        return self.r // self.ranks if self.kind == "bd" else self.r


@dataclass(frozen=True)
class Group:
    """Sites that share an input."""

    name: str
    in_features: int
    out_features: tuple[int, ...]
    is_row: bool


def groups_of(case: Case) -> list[Group]:
    """The four products of a layer on one rank."""
    m, n = MODELS[case.model], case.ranks
    return [
        Group("qkv", m.hidden, (m.hidden // n, m.kv // n, m.kv // n), False),
        Group("o", m.hidden // n, (m.hidden,), True),
        Group("gate_up", m.hidden, (m.intermediate // n, m.intermediate // n), False),
        Group("down", m.intermediate // n, (m.hidden,), True),
    ]


class Layers:
    """Weights, inputs and a pool of random factors for all layers of a graph."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.groups = groups_of(case)
        self.num_layers = MODELS[case.model].layers
        make = {"device": device, "dtype": torch.bfloat16}
        self.weights = [
            [torch.randn(sum(group.out_features), group.in_features, **make) / 64 for group in self.groups]
            for _ in range(self.num_layers)
        ]
        self.x = [torch.randn(case.tokens, group.in_features, **make) for group in self.groups]
        self.y = [torch.empty(case.tokens, sum(group.out_features), **make) for group in self.groups]
        self.sites = self._number_sites()
        self.slots, self.pool = self._fill_pool(device)
        self.scales = torch.full(self.slots.shape[:2], 0.5, device=device)
        self.token_slot = (torch.arange(case.tokens, device=device) % case.active).sort().values.to(torch.int32)
        self.work = launch.segment_work(self.token_slot, 32) if launch.works_by_segment(case.tokens) else None
        self.width = max(8, case.local_rank)

    def _number_sites(self) -> list[list[list[int]]]:
        number = itertools.count()
        return [[[next(number) for _ in group.out_features] for group in self.groups] for _ in range(self.num_layers)]

    def _fill_pool(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Factors of one slot lie together, as `AdapterBank` writes them."""
        r, end = self.case.local_rank, 0
        num_sites = self.sites[-1][-1][-1] + 1
        rows = torch.zeros(num_sites, self.case.slots, len(SlotField), dtype=torch.int64)
        for slot in range(self.case.slots):
            for layer, group_index in itertools.product(range(self.num_layers), range(len(self.groups))):
                group = self.groups[group_index]
                for site, out in zip(self.sites[layer][group_index], group.out_features, strict=True):
                    c = self.case.blocks if r % self.case.blocks == 0 else 1
                    a_blocks, b_blocks = (c, 1) if group.is_row else (1, c)
                    a_size, b_size = r * group.in_features // a_blocks, r * out // b_blocks
                    rows[site, slot] = torch.tensor([end, end + a_size, r, r, a_blocks, b_blocks, 0])
                    end += a_size + b_size
        pool = torch.randn(end, device=device, dtype=torch.bfloat16) / 16
        return rows.to(device), pool

    def base(self, layer: int, group: int) -> None:
        """The product without LoRA."""
        torch.mm(self.x[group], self.weights[layer][group].t(), out=self.y[group])

    def lora(self, layer: int, group: int, tiles: ApplyTiles | None = None) -> None:
        """y += scale * (B (A x)), as the operator does it; ``tiles`` for the one launch of few tokens."""
        x, y, sites = self.x[group], self.y[group], self.sites[layer][group]
        bank = (self.pool, self.slots, self.scales, self.token_slot)
        out_features = self.groups[group].out_features
        if self.work is None:
            launch.apply_by_token(x, y, *bank, sites, out_features, tiles)
        else:
            launch.apply_(x, y, *bank, self.work, sites, self.width, out_features)

    def shrink(self, layer: int, group: int, tiles: Tiles | None = None) -> Tensor:
        """Planes of h."""
        arguments = (self.x[group], self.pool, self.slots, self.token_slot, self.work, self.sites[layer][group])
        return launch.shrink(*arguments, self.width, tiles)

    def expand(self, layer: int, group: int, h: Tensor, tiles: Tiles | None = None) -> None:
        """y += scale * (B h)."""
        launch.expand(
            self.y[group], h, self.pool, self.slots, self.scales, self.token_slot, self.work,
            self.sites[layer][group], self.groups[group].out_features, 1, tiles,
        )  # fmt: skip

    def run(self, with_lora: bool) -> None:
        """All layers once."""
        for layer, group in itertools.product(range(self.num_layers), range(len(self.groups))):
            self.base(layer, group)
            if with_lora:
                self.lora(layer, group)

    def error(self) -> float:
        """Largest relative error of a group of the first layer against float64."""
        return max(self._group_error(group) for group in range(len(self.groups)))

    def _group_error(self, index: int) -> float:
        group = self.groups[index]
        self.y[index].normal_()
        wanted = self.y[index].double()
        self.lora(0, index)
        x, start = self.x[index].double(), 0
        for site, out in zip(self.sites[0][index], group.out_features, strict=True):
            for slot in range(self.case.active):
                rows = self.token_slot == slot
                fields = self.slots[site, slot].tolist()
                r = fields[SlotField.A_RANK]
                a = self._dense(fields[SlotField.A_OFFSET], r, group.in_features, fields[SlotField.A_BLOCKS])
                b = self._dense(fields[SlotField.B_OFFSET], r, out, fields[SlotField.B_BLOCKS])
                wanted[rows, start : start + out] += 0.5 * (x[rows] @ a.t()) @ b
            start += out
        return float((self.y[index].double() - wanted).norm() / wanted.norm())

    def _dense(self, offset: int, rank: int, columns: int, blocks: int) -> Tensor:
        flat = self.pool[offset : offset + rank * columns // blocks].double().view(rank, columns // blocks)
        return torch.block_diag(*flat.chunk(blocks))

    def floor_us(self) -> float:
        """Bytes of the active adapters' factors, x, h and y (read and written) over the copy bandwidth, a layer."""
        case, total = self.case, 0.0
        for group in self.groups:
            c = case.blocks
            a = case.local_rank * group.in_features // (c if group.is_row else 1) * len(group.out_features)
            b = sum(case.local_rank * out // (1 if group.is_row else c) for out in group.out_features)
            total += case.active * (a + b) * 2
            total += case.tokens * (group.in_features * 2 + 4 * sum(group.out_features))
            total += case.tokens * case.local_rank * len(group.out_features) * 8
        return total / BANDWIDTH * 1e6


def replay_us(run: Callable[[], object], groups: int = 9, replays: int = 20) -> float:
    """Median time of a graph replay, microseconds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(5):
        graph.replay()
    times = []
    for _ in range(groups):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / replays)
    return statistics.median(times)


TABLE = [
    *(Case(m, 8, "bd", r, t, t, t) for m in ("8B", "70B") for r in (16, 64) for t in (16, 64)),
    *(Case("8B", 8, "rep", r, t, t, t) for r in (16, 64) for t in (16, 64)),
    Case("8B", 8, "bd", 16, 16, 1, 1),
    Case("8B", 8, "bd", 16, 16, 1, 64),
    Case("8B", 2, "bd", 32, 16, 16, 16, blocks=4),
    Case("8B", 4, "bd", 32, 16, 16, 16, blocks=2),
    *(Case("8B", 8, "bd", 64, t, min(t, 64), 64) for t in (1, 4, 33, 100, 256)),
    Case("8B", 8, "bd", 16, 2048, 8, 8),
    Case("8B", 8, "rep", 16, 2048, 8, 8),
    Case("8B", 8, "bd", 64, 2048, 8, 8),
    Case("8B", 8, "rep", 64, 2048, 8, 8),
]


def measure(case: Case) -> dict[str, object]:
    """One row: microseconds a layer."""
    layers = Layers(case, torch.device("cuda"))
    error = layers.error()
    base = replay_us(lambda: layers.run(False)) / layers.num_layers
    full = replay_us(lambda: layers.run(True)) / layers.num_layers
    return {**asdict(case), "error": error, "base_us": base, "lora_us": full - base, "floor_us": layers.floor_us()}


def tune(case: Case) -> Iterator[str]:
    """The best tile sizes of every group of sites, and the default's place among them."""
    layers = Layers(case, torch.device("cuda"))
    for group, description in enumerate(layers.groups):
        found = sorted(_timed(layers, group), key=lambda row: row[0])
        default = apply_tiles_for(case.tokens)
        for us, tiles in [*found[:3], *((us, tiles) for us, tiles in found if tiles == default)]:
            note = "  (default)" if tiles == default else ""
            yield f"{case.model} {case.kind} r={case.r} T={case.tokens} {description.name:>8} {us:6.2f} {tiles}{note}"


def _timed(layers: Layers, group: int) -> Iterator[tuple[float, ApplyTiles]]:
    shapes = itertools.product((2, 4, 8), ((512, 4), (1024, 4), (1024, 8), (2048, 8)), (256, 512, 1024), (False, True))
    for rows, (depth, warps), columns, overlap in shapes:
        yield _time_of(layers, group, ApplyTiles(rows, depth, columns, warps, overlap))


def _time_of(layers: Layers, group: int, tiles: ApplyTiles) -> tuple[float, ApplyTiles]:
    def run() -> None:
        for layer in range(layers.num_layers):
            layers.lora(layer, group, tiles)

    return replay_us(run, 3, 5) / layers.num_layers, tiles


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or the tile sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", type=int, help="the first so many cases")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if options.tune:
        for case in (TABLE[0], TABLE[3]):
            print(*tune(case), sep="\n")
        return
    print("model  N kind  r tokens active slots  c | base us | LoRA us | floor us | with/base | error")
    rows = []
    for case in TABLE[: options.only]:
        row = measure(case)
        rows.append(row)
        base, lora = float(row["base_us"]), float(row["lora_us"])  # type: ignore[arg-type]
        print(
            f"{case.model:>5} {case.ranks:2} {case.kind:>4} {case.r:2} {case.tokens:6} {case.active:6} {case.slots:5} "
            f"{case.blocks:2} | {base:7.1f} | {lora:7.1f} | {row['floor_us']:8.1f} | {1 + lora / base:9.2f} "
            f"| {row['error']:.1e}",
            flush=True,
        )
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
