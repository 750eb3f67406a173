"""A decoder layer's products and LoRA at one tensor-parallel rank's shapes, on one GPU, for the kernel benchmarks."""

import itertools
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdlora_compile.runtime.kernels import launch
from bdlora_compile.runtime.kernels.tiles import Call, Plan
from bdlora_compile.runtime.linear_op import lora_linear
from bdlora_compile.runtime.ops import SlotField, lora_work
from benchmarks.replays import replay_us

BANDWIDTH = 3.0e12
"""Bytes a second of a large copy on an H100 (read plus write): what the floor divides by."""


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama, and layers in one graph: enough that their weights exceed the cache many times."""

    name: str
    hidden: int
    kv: int
    intermediate: int
    layers: int


MODELS = {
    "8B": Model("8B", 4096, 1024, 14336, 8),
    "70B": Model("70B", 8192, 1024, 28672, 4),
}


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        kind: "bd": every local rank is r / N. "rep": every local rank is r.
        active: distinct adapters in the batch.
        slots: adapters held.
        blocks: c, packed blocks of the factor that is cut (bd only).
        mixed: local ranks that slots have in turn, instead of one for all.
        dtype: "bf16" or "fp16".
    """

    model: str
    ranks: int
    kind: str
    r: int
    tokens: int
    active: int
    slots: int
    blocks: int = 1
    mixed: tuple[int, ...] = ()
    dtype: str = "bf16"

    def local_rank(self, slot: int) -> int:
        """Rank of the slot's factors on this rank."""
        if self.mixed:
            return self.mixed[slot % len(self.mixed)]
        return self.r // self.ranks if self.kind == "bd" else self.r

    @property
    def width(self) -> int:
        """The largest local rank."""
        return max(self.local_rank(slot) for slot in range(self.slots))

    @property
    def num_layers(self) -> int:
        """Layers in one graph."""
        return max(2, MODELS[self.model].layers // (4 if self.ranks == 1 else 1))


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

    def __init__(self, case: Case, num_layers: int | None = None, device: str = "cuda") -> None:
        self.case, self.device = case, device
        self.groups = groups_of(case)
        self.num_layers = num_layers or case.num_layers
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype]
        self.weights = [
            [self._random(sum(group.out_features), group.in_features) / 64 for group in self.groups]
            for _ in range(self.num_layers)
        ]
        self.x = [self._random(case.tokens, group.in_features) for group in self.groups]
        self.y = [self._random(case.tokens, sum(group.out_features)) for group in self.groups]
        number = itertools.count()
        self.sites = [
            [[next(number) for _ in group.out_features] for group in self.groups] for _ in range(self.num_layers)
        ]
        self.slots, self.pool = self._fill_pool(next(number))
        self.scales = torch.full(self.slots.shape[:2], 0.5, device=device)
        self.token_slot = (torch.arange(case.tokens, device=device) % case.active).sort().values.to(torch.int32)
        order, segments = lora_work(self.x[0], self.token_slot)
        self.work = launch.work_for(case.tokens, order, segments)
        self.bank = (self.pool, self.slots, self.scales, self.token_slot, order, segments)
        """What operators take between W and `sizes`."""

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def _fill_pool(self, num_sites: int) -> tuple[Tensor, Tensor]:
        """Factors of one slot lie together, as `AdapterBank` writes them."""
        end = 0
        rows = torch.zeros(num_sites, self.case.slots, len(SlotField), dtype=torch.int64)
        for slot in range(self.case.slots):
            r = self.case.local_rank(slot)
            for layer, (number, group) in itertools.product(range(self.num_layers), enumerate(self.groups)):
                for site, out in zip(self.sites[layer][number], group.out_features, strict=True):
                    a_blocks, b_blocks = (self.case.blocks, 1) if group.is_row else (1, self.case.blocks)
                    a_size, b_size = r * group.in_features // a_blocks, r * out // b_blocks
                    rows[site, slot] = torch.tensor([end, end + a_size, r, r, a_blocks, b_blocks, 0])
                    end += a_size + b_size
        pool = torch.empty(end, device=self.device, dtype=self.dtype)
        for part in pool.split(1 << 28):
            part.normal_(0, 1 / 16)
        return rows.to(self.device), pool

    def call(self, group: int) -> Call:
        """What the choice of kernels and tiles sees."""
        description = self.groups[group]
        return Call(self.case.tokens, description.in_features, description.out_features, self.case.width)

    def sizes(self, layer: int, group: int) -> tuple[list[int], int, tuple[int, ...]]:
        """Sites, width and columns of a layer's group, as operators take them."""
        return self.sites[layer][group], self.case.width, self.groups[group].out_features

    def factors(self, layer: int, group: int) -> launch.Factors:
        """Of the sites of a layer's group."""
        return launch.Factors(self.pool, self.slots, self.token_slot, self.sites[layer][group])

    def arrive(self, group: int) -> None:
        """What writes x in a layer (norm, attention, activation): a kernel that no other starts beside.

        In line without it, products would start beside each other, as they never do in a layer.
        """
        self.x[group].mul_(1)

    def base(self, layer: int, group: int) -> None:
        """The product without LoRA."""
        torch.mm(self.x[group], self.weights[layer][group].t(), out=self.y[group])

    def lora(self, layer: int, group: int, plan: Plan | None = None) -> None:
        """y += scale * (B (A x)), as the operator does it."""
        factors, outs = self.factors(layer, group), self.groups[group].out_features
        launch.apply_(self.x[group], self.y[group], factors, self.scales, self.work, self.case.width, outs, plan)

    def apart(self, layer: int, group: int, plan: Plan | None = None) -> Tensor:
        """The product, and LoRA in launches of its own."""
        self.base(layer, group)
        self.lora(layer, group, plan)
        return self.y[group]

    def both(self, layer: int, group: int) -> Tensor:
        """The product with LoRA, as the operator `lora_linear` does it: side by side for few tokens."""
        y: Tensor = lora_linear(self.x[group], self.weights[layer][group], None, *self.bank, *self.sizes(layer, group))
        return y

    def us(self, with_lora: bool, plans: Mapping[int, Plan] | None = None) -> float:
        """Microseconds of a layer: all products, and LoRA on all groups, each behind a kernel that writes its x.

        ``plans``: LoRA in launches of its own, and with these plans by group instead of the table's.
        """

        def run() -> None:
            for layer, group in itertools.product(range(self.num_layers), range(len(self.groups))):
                self.arrive(group)
                if not with_lora:
                    self.base(layer, group)
                elif plans is None:
                    self.both(layer, group)
                else:
                    self.apart(layer, group, plans.get(group))

        return replay_us(run) / self.num_layers

    def error(self) -> float:
        """Largest relative error of a group of the first layer against float64, product and LoRA."""
        return max(self.product_error(index, self.wanted(index)) for index in range(len(self.groups)))

    def wanted(self, index: int) -> Tensor:
        """A group's product with LoRA of the first layer in float64."""
        return self._with_lora(index, self.x[index].double() @ self.weights[0][index].double().t())

    def product_error(self, index: int, wanted: Tensor) -> float:
        """Relative error of a group's product with LoRA."""
        found = self.both(0, index)
        return float((found.double() - wanted).norm() / wanted.norm())

    def group_error(self, index: int, plan: Plan | None = None) -> float:
        """Relative error of LoRA alone on one group of the first layer against float64."""
        self.y[index].normal_()
        wanted = self._with_lora(index, self.y[index].double())
        self.lora(0, index, plan)
        return float((self.y[index].double() - wanted).norm() / wanted.norm())

    def _with_lora(self, index: int, y: Tensor) -> Tensor:
        """y + scale * (B (A x)) of the first layer in float64."""
        group, x, start = self.groups[index], self.x[index].double(), 0
        for site, out in zip(self.sites[0][index], group.out_features, strict=True):
            for slot in range(self.case.active):
                rows = self.token_slot == slot
                fields = self.slots[site, slot].tolist()
                r = fields[SlotField.A_RANK]
                a = self._dense(fields[SlotField.A_OFFSET], r, group.in_features, fields[SlotField.A_BLOCKS])
                b = self._dense(fields[SlotField.B_OFFSET], r, out, fields[SlotField.B_BLOCKS])
                y[rows, start : start + out] += 0.5 * (x[rows] @ a.t()) @ b
            start += out
        return y

    def _dense(self, offset: int, rank: int, columns: int, blocks: int) -> Tensor:
        flat = self.pool[offset : offset + rank * columns // blocks].double().view(rank, columns // blocks)
        return torch.block_diag(*flat.chunk(blocks))

    def floor_us(self) -> float:
        """Bytes of the active adapters' factors, x, h and y (read and written) over the copy bandwidth, a layer."""
        case, total = self.case, 0.0
        used = self.token_slot.tolist()
        for group in self.groups:
            a_blocks, b_blocks = (case.blocks, 1) if group.is_row else (1, case.blocks)
            elements = sum(group.in_features // a_blocks + out // b_blocks for out in group.out_features)
            total += 2 * elements * sum(case.local_rank(slot) for slot in set(used))
            total += case.tokens * (group.in_features * 2 + 4 * sum(group.out_features))
            total += 8 * len(group.out_features) * sum(case.local_rank(slot) for slot in used)
        return total / BANDWIDTH * 1e6


def in_processes(task: Callable[[Any], None], jobs: Sequence[Any], workers: int) -> None:
    """Run ``task`` on every job in processes of their own, so that what they compile is in Triton's cache."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(task, jobs):
            pass
