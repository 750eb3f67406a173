"""What LoRA adds beside a product, against dense products in float64; on a CPU in Triton's interpreter.

Tolerance: factors are taken as they are by the reference, sums are in float32, and the result is rounded once: half a
unit in the last place of fp16, 2^-11 of the value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bdlora_compile.factors import LocalFactors, LocalShape
from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.runtime.kernels import launch
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT, Expand
from tests.kernels.test_kernels import DEVICE, error

TOLERANCE = 2 * 2.0**-11
SITES = ("q", "k", "v")
SLOTS = [0, 1, -1, 1, 0]
MIXES = {
    "several of each": SLOTS,
    "one adapter": [1] * 20,
    "sixteen, three, one and none": [*[0] * 17, 1, 1, 1, -1],
    "two and three": [0, 1, 1, 0, 1],
    "alone or without": [0, -1, 1, -1],
    "none": [-1] * 3,
}


@dataclass(frozen=True)
class Case:
    """B of two slots at some sites.

    Attributes:
        ranks: of each slot, for each site.
        out_features: columns of each site's B.
        columns: of the product.
        blocks: of B.
        starts: the first column that each slot's B writes.
        parts: ranks whose shares of h lie side by side.
        planes: of h.
    """

    ranks: tuple[tuple[int, ...], tuple[int, ...]]
    out_features: tuple[int, ...]
    columns: int
    blocks: int = 1
    starts: tuple[int, int] = (0, 0)
    parts: int = 1
    planes: int = 2


CASES = {
    "three sites": Case(((4, 0, 8), (2, 6, 5)), (64, 32, 24), 120),
    "rows in several turns": Case(((20,), (9,)), (64,), 64),
    "packed": Case(((4, 4, 8), (8, 4, 4)), (64, 32, 32), 128, blocks=4),
    "odd columns": Case(((4, 2, 2), (2, 2, 4)), (30, 10, 10), 50, blocks=2),
    "a slice": Case(((4,), (3,)), (40,), 120, starts=(40, 80)),
    "an odd slice": Case(((4,), (3,)), (41,), 123, starts=(41, 82)),
    "packed slices": Case(((4,), (8,)), (32,), 128, blocks=2, starts=(8, 64)),
    "a slice that ends behind the product": Case(((4,), (3,)), (40,), 96, starts=(64, 0)),
    "shares of ranks": Case(((4, 2, 8), (8, 2, 4)), (64, 32, 24), 120, parts=2, planes=1),
}


class Call:
    """A case with random factors and h, and what is wanted in float64."""

    def __init__(self, case: Case, chosen: Sequence[int] = SLOTS, segment: int = 0) -> None:
        torch.manual_seed(len(case.ranks[0]) + case.columns)
        self.case, self.chosen = case, chosen
        self.bank = AdapterBank(SITES[: len(case.out_features)], 2, 60000, 256, torch.float16, DEVICE)
        self.factors = {}
        for slot, ranks in enumerate(case.ranks):
            for site, (rank, out) in enumerate(zip(ranks, case.out_features, strict=True)):
                if rank:
                    shape = LocalShape(rank, rank, 1, case.blocks, 8, out, case.starts[slot])
                    b = (torch.randn(rank, out // case.blocks) / 4).half()
                    self.factors[slot, site] = LocalFactors(shape, torch.zeros(rank, 8).half(), b)
            own = {SITES[at]: (factor, 0.5 + slot) for (of, at), factor in self.factors.items() if of == slot}
            self.bank.write(slot, self.bank.stage(own), self.bank.used_elements())
        self.width = max(map(max, case.ranks)) // case.parts
        rows = case.parts * len(case.out_features)
        self.h = torch.randn(case.planes, len(chosen), rows, self.width, device=DEVICE) / 2
        self.token_slot = torch.tensor(chosen, dtype=torch.int32, device=DEVICE)
        self.work = launch.segment_work(self.token_slot, segment) if segment else None

    def run(self) -> Tensor:
        """By the kernel."""
        sites = [*range(len(self.case.out_features))]
        factors = launch.Factors(self.bank.pool, self.bank.slots, self.token_slot, sites)
        path = launch.Beside(factors, self.bank.scales, self.case.out_features, self.case.parts, self.work, together=3)
        delta = launch.delta(self.h, path, self.case.columns, torch.float16)
        assert delta.shape == (BY_TOKEN_LIMIT, self.case.columns)
        return delta[: len(self.chosen)]

    def expected(self) -> Tensor:
        """The same, token by token."""
        case, found = self.case, torch.zeros(len(self.chosen), self.case.columns, dtype=torch.float64)
        # [T, parts, sites, width]
        h = self.h.double().cpu().sum(0).unflatten(1, (case.parts, -1))
        for token, slot in enumerate(self.chosen):
            begin = 0
            for site, out in enumerate(case.out_features):
                if (slot, site) in self.factors:
                    b = self.factors[slot, site].b.double()
                    own = h[token, :, site, : b.shape[0] // case.parts].flatten()
                    blocks = [block.t() for block in b.chunk(case.blocks)]
                    added = (0.5 + slot) * torch.block_diag(*blocks) @ own
                    start = begin + case.starts[slot]
                    room = min(out, case.columns - start)
                    found[token, start : start + room] = added[:room]
                begin += out
        return found


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few rows and columns, of which all cases have several."""
    monkeypatch.setattr(launch, "delta_tiles", lambda _: Expand(rows=8, columns=32, warps=1))
    monkeypatch.setattr(launch, "SHARES", 2)


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def call(request: pytest.FixtureRequest, _small_tiles: None) -> Call:
    """Of tokens that are not grouped."""
    return Call(CASES[request.param])


def test_all_columns_are_written(call: Call) -> None:
    """Zeros where the token has no adapter, the slot nothing at a site, or its B no column."""
    found, wanted = call.run(), call.expected()
    assert error(found, wanted) < TOLERANCE
    assert not found[wanted == 0].any(), "memory that nobody wrote is NaN here"


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("case", CASES)
def test_grouped_tokens_have_the_same(case: str, mix: str) -> None:
    call = Call(CASES[case], MIXES[mix], segment=16)
    found, wanted = call.run(), call.expected()
    assert not wanted.any() or error(found, wanted) < TOLERANCE
    assert not found[wanted == 0].any(), "memory that nobody wrote is NaN here"


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("damage", ["order", "slot", "count", "h"])
@pytest.mark.parametrize("case", ["three sites", "packed"])
def test_damage_to_groups_is_noticed(case: str, damage: str) -> None:
    """The twins: other tokens, another adapter, a token left out, another h of one of sixteen."""
    call = Call(CASES[case], MIXES["sixteen, three, one and none"], segment=16)
    wanted, work = call.expected(), call.work
    assert work is not None
    match damage:
        case "order":
            call.work = work._replace(order=work.order.roll(1))
        case "slot":
            work.segments[work.segments[:, 5] == 3, 3] = 0
        case "count":
            work.segments[work.segments[:, 5] == 16, 5] = 15
        case "h":
            call.h[:, 7] *= 1.05
    assert not error(call.run(), wanted) < TOLERANCE


@pytest.mark.parametrize("damage", ["h", "scale", "slot"])
def test_damage_is_noticed(call: Call, damage: str) -> None:
    wanted = call.expected()
    if damage == "h":
        call.h[:, 1] *= 1.05
    elif damage == "scale":
        call.bank.scales *= 1.05
    else:
        call.token_slot[0] = 1
    assert not error(call.run(), wanted) < TOLERANCE


def test_usual_tiles() -> None:
    call = Call(CASES["three sites"])
    assert error(call.run(), call.expected()) < TOLERANCE
