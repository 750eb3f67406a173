"""What LoRA adds beside a product, against dense products in float64; on a CPU in Triton's interpreter.

Tolerance: factors are taken as they are by the reference, sums are in float32, and the result is rounded once: half a
unit in the last place of fp16, 2^-11 of the value.
"""

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

    def __init__(self, case: Case) -> None:
        torch.manual_seed(len(case.ranks[0]) + case.columns)
        self.case = case
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
        self.h = torch.randn(case.planes, len(SLOTS), rows, self.width, device=DEVICE) / 2
        self.token_slot = torch.tensor(SLOTS, dtype=torch.int32, device=DEVICE)

    def run(self) -> Tensor:
        """By the kernel."""
        sites = [*range(len(self.case.out_features))]
        factors = launch.Factors(self.bank.pool, self.bank.slots, self.token_slot, sites)
        path = launch.Beside(factors, self.bank.scales, self.case.out_features, self.case.parts)
        delta = launch.delta(self.h, path, self.case.columns, torch.float16)
        assert delta.shape == (BY_TOKEN_LIMIT, self.case.columns)
        return delta[: len(SLOTS)]

    def expected(self) -> Tensor:
        """The same, token by token."""
        case, found = self.case, torch.zeros(len(SLOTS), self.case.columns, dtype=torch.float64)
        # [T, parts, sites, width]
        h = self.h.double().cpu().sum(0).unflatten(1, (case.parts, -1))
        for token, slot in enumerate(SLOTS):
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


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Call:
    """With tiles of a few rows and columns, of which all cases have several."""
    monkeypatch.setattr(launch, "delta_tiles", lambda _: Expand(rows=8, columns=32, warps=1))
    return Call(CASES[request.param])


def test_all_columns_are_written(call: Call) -> None:
    """Zeros where the token has no adapter, the slot nothing at a site, or its B no column."""
    found, wanted = call.run(), call.expected()
    assert error(found, wanted) < TOLERANCE
    assert not found[wanted == 0].any(), "memory that nobody wrote is NaN here"


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
