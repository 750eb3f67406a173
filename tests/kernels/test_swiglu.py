"""silu(gate) * up with the LoRA on both sides of it, against dense products in float64; on a CPU in the interpreter.

Tolerance, relative to the largest value: gate, up, silu(gate) and the result are rounded to fp16, each by half a unit
in the last place (2^-11); what h sums is that result, and sums are in float32.
"""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from bdlora_compile.factors import LocalFactors, LocalShape
from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.runtime.kernels import launch, launch_swiglu, tiles
from tests.kernels.test_kernels import DEVICE, error

TOLERANCE = 4 * 2.0**-11
SITES = ("gate", "up", "down")
TOKENS, PLANES = 5, 3


@dataclass(frozen=True)
class Case:
    """Ranks of two slots at gate, up and down; blocks of B at gate and up and of A at down; columns of a program."""

    features: int
    blocks: int
    columns: int
    ranks: tuple[tuple[int, int, int], ...]
    start: int = 0


CASES = {
    "one block, several turns": Case(64, 1, 32, ((9, 12, 16), (1, 0, 3))),
    "tiles in a block": Case(64, 2, 32, ((4, 8, 2), (2, 2, 18))),
    "a tile in two blocks": Case(144, 3, 64, ((6, 3, 9), (3, 30, 3))),
    "a tile in many blocks": Case(96, 4, 64, ((4, 8, 12), (8, 4, 4))),
    "odd blocks": Case(40, 2, 32, ((4, 2, 6), (2, 4, 2))),
    "B begins later": Case(64, 1, 64, ((3, 2, 4), (2, 5, 1)), start=8),
}


@dataclass
class Call:
    """A case with random factors and inputs, and what is wanted in float64."""

    case: Case
    factors: dict[tuple[int, str], LocalFactors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        case = self.case
        torch.manual_seed(case.features + case.blocks)
        self.bank = AdapterBank(SITES, len(case.ranks), 60000, 256, torch.float16, DEVICE)
        for slot, ranks in enumerate(case.ranks):
            for site, rank in zip(SITES, ranks, strict=True):
                if rank:
                    self.factors[slot, site] = self._random(rank, is_down=site == "down")
            own = {site: (self.factors[slot, site], 0.5 + slot) for site in SITES if (slot, site) in self.factors}
            self.bank.write(slot, self.bank.stage(own), self.bank.used_elements())
        self.width = max(max(ranks) for ranks in case.ranks)
        self.gate_up = torch.randn(TOKENS, 2 * case.features).to(DEVICE, torch.float16)
        self.h = torch.randn(PLANES, TOKENS, 2, self.width, device=DEVICE) / 2
        self.token_slot = torch.tensor([0, 1, -1, 1, 0], dtype=torch.int32, device=DEVICE)

    def _random(self, rank: int, *, is_down: bool) -> LocalFactors:
        features, blocks = self.case.features, self.case.blocks
        a_blocks, b_blocks = (blocks, 1) if is_down else (1, blocks)
        start = 0 if is_down else self.case.start
        shape = LocalShape(rank, rank, a_blocks, b_blocks, features, features, start)
        a, b = (torch.randn(rank, features // own).half() / 4 for own in (a_blocks, b_blocks))
        return LocalFactors(shape, a, b)

    def run(self, *, expands: bool = True, shrinks: bool = True) -> tuple[Tensor, Tensor | None]:
        """By the kernel."""
        bank = self.bank
        gate_and_up = launch.Factors(bank.pool, bank.slots, self.token_slot, [0, 1])
        m = torch.empty(TOKENS, self.case.features, dtype=torch.float16, device=DEVICE)
        planes = tiles.swiglu_planes(self.case.features)
        made = torch.empty(planes, TOKENS, 1, tiles.h_width(self.width), device=DEVICE)
        down = launch_swiglu.Behind(launch.Factors(bank.pool, bank.slots, self.token_slot, [2]), made)
        h, behind = self.h if expands else None, down if shrinks else None
        launch_swiglu.swiglu(self.gate_up, m, gate_and_up, bank.scales, h, behind)
        return m, made if shrinks else None

    def wanted_m(self, *, expands: bool = True) -> Tensor:
        gate, up = self.gate_up.double().cpu().clone().chunk(2, dim=1)
        for token, slot in enumerate(self.token_slot.tolist() if expands else []):
            for site, y in enumerate((gate, up)):
                found = self.factors.get((slot, SITES[site]))
                if found is not None:
                    dense = torch.block_diag(*found.b.double().chunk(self.case.blocks))
                    added = self.h.double().cpu().sum(0)[token, site, : dense.shape[0]] @ dense
                    y[token, self.case.start :] += (0.5 + slot) * added[: self.case.features - self.case.start]
        return gate * gate.sigmoid() * up

    def h_error(self, m: Tensor, planes: Tensor) -> float:
        """Of h of all tokens with an adapter at down, of the m that was found."""
        found, wanted = [], []
        for token, slot in enumerate(self.token_slot.tolist()):
            factors = self.factors.get((slot, "down"))
            if factors is not None:
                dense = torch.block_diag(*factors.a.double().chunk(self.case.blocks))
                wanted.append(dense @ m[token].double().cpu())
                found.append(planes.sum(0)[token, 0, : dense.shape[0]])
        return error(torch.cat(found), torch.cat(wanted))


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Call:
    case = CASES[request.param]
    for module in (tiles, launch_swiglu):
        monkeypatch.setattr(module, "swiglu_columns", lambda _: case.columns)
    return Call(case)


@pytest.mark.parametrize("expands", [True, False], ids=["with_lora", "without"])
def test_both_sides(call: Call, expands: bool) -> None:
    """Gate and up with their LoRA or without; h of down is that of the m that was found."""
    m, planes = call.run(expands=expands)
    assert error(m, call.wanted_m(expands=expands)) < TOLERANCE
    assert not error(m, call.wanted_m(expands=not expands)) < 10 * TOLERANCE
    assert planes is not None
    assert planes.shape[-1] >= call.width
    assert call.h_error(m, planes) < 1e-5, "sums in float32 of the very numbers"


def test_without_h_of_down(call: Call) -> None:
    m, planes = call.run(shrinks=False)
    assert planes is None
    assert error(m, call.wanted_m()) < TOLERANCE


@pytest.mark.parametrize("damage", ["scale", "token", "offset"])
def test_damage_is_noticed(call: Call, damage: str) -> None:
    """The twins: a scale dropped, tokens with another slot, factors read one row off."""
    if damage == "scale":
        call.bank.scales.fill_(3)
    elif damage == "token":
        call.token_slot.copy_(1 - call.token_slot.clamp(min=0))
    else:
        call.bank.slots[:, :, :2] += call.case.features
    wanted = call.wanted_m() if damage != "token" else Call(call.case).wanted_m()
    m, planes = call.run()
    assert planes is not None
    if damage == "token":
        call.token_slot.copy_(Call(call.case).token_slot)
    assert not error(m, wanted) < 10 * TOLERANCE
    if damage != "scale":
        assert not call.h_error(m, planes) < 0.02
