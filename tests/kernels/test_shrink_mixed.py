"""h of few tokens grouped by slot, by one kernel for any mix, against float64; on a CPU in Triton's interpreter.

fp16, since the interpreter multiplies the bits of bf16 operands.

Tolerance: x and A are taken as they are by the reference; products are exact in float32, and their sums have some tens
of terms of one size.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bdlora_compile.runtime.kernels import launch
from bdlora_compile.runtime.kernels.tiles import Shrink, h_width, segment_tokens
from bdlora_compile.runtime.ops import lora_shrink
from tests.kernels.test_kernels import DEVICE, Case, bank_of, inputs

TOLERANCE = 1e-5
TOKENS = 20
RANKS = ((2, 4, 0), (8, 2, 6), (4, 4, 8))
MIXES = {
    "one adapter": [0] * TOKENS,
    "sixteen, one, two and one": [*[1] * 17, 0, 2, 2],
    "alone or without": [0, -1, 1, -1, 2, *[-1] * 15],
    "in turns": [token % 4 - 1 for token in range(TOKENS)],
    "none": [-1] * TOKENS,
}
SHAPES = {
    "plain": Case(RANKS, 64, (64, 32, 32), 1, 1, TOKENS, 3, torch.float16, is_strided=True),
    "packed": Case(RANKS, 64, (64, 32, 32), 2, 1, TOKENS, 4, torch.float16, is_strided=False),
    "odd columns": Case(RANKS, 36, (36, 6, 6), 1, 1, TOKENS, 5, torch.float16, is_strided=False),
    "wide": Case(((24, 4, 9), (8, 2, 3), (40, 17, 1)), 64, (64, 32, 32), 1, 1, TOKENS, 6, torch.float16, True),
}
TILES = (Shrink(16, 32, 4, stages=2), Shrink(4, 64, 4, stages=2), Shrink(16, 64, 4, stages=2))


class Call:
    """A case with a mix of slots."""

    def __init__(self, case: Case, mix: list[int]) -> None:
        self.bank, _ = bank_of(case)
        self.width = h_width(case.width)
        self.x, _, _ = inputs(case)
        self.token_slot = torch.tensor(mix, dtype=torch.int32, device=DEVICE)
        self.factors = launch.Factors.of(self.bank.pool, self.bank.slots, self.token_slot, [0, 1, 2])
        self.work = launch.segment_work(self.token_slot, segment_tokens(TOKENS))

    def wanted(self) -> Tensor:
        """h [T, 3, width] in float64."""
        h = lora_shrink._init_fn(
            self.x.double(), self.bank.pool.double(), self.bank.slots, self.token_slot, [0, 1, 2], self.width
        )
        return h.unflatten(1, (3, -1))

    def error(self) -> float:
        """Of all that a reader reads, largest."""
        h, wanted = launch.make_h_beside(self.x, self.factors, self.work, self.width).double().sum(0), self.wanted()
        rank = self.bank.slots[:, self.token_slot.clamp(min=0).long(), 2].t()[..., None]
        is_read = (torch.arange(self.width, device=DEVICE) < rank) & (self.token_slot >= 0)[:, None, None]
        assert not wanted[~is_read].any()
        return float(torch.where(is_read, h - wanted, 0).abs().max() / wanted.abs().max().clamp(min=1e-9))


@pytest.fixture(params=TILES, ids=str, autouse=True)
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few rows and columns, of which all cases have several."""
    monkeypatch.setattr(launch, "shrink_beside", lambda *_: request.param)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_mix_of_adapters(shape: str, mix: str) -> None:
    assert Call(SHAPES[shape], MIXES[mix]).error() < TOLERANCE


@pytest.mark.parametrize("damage", ["order", "slot", "count"])
def test_damage_is_noticed(damage: str) -> None:
    """The twins: other tokens, another adapter, a token left out."""
    call = Call(SHAPES["plain"], MIXES["sixteen, one, two and one"])
    order, segments = call.work.order, call.work.segments
    match damage:
        case "order":
            call.work = call.work._replace(order=order.roll(1))
        case "slot":
            segments[0, 0] += 1
        case "count":
            segments[segments[:, 2] == segments[:, 2].max(), 2] -= 1
    assert not call.error() < TOLERANCE


def test_the_tensor_cores_have_sixteen_columns_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the interpreter does not ask for."""
    launched: dict[str, int] = {}

    class Recorded:
        def __getitem__(self, _: object) -> Callable[..., None]:
            return lambda *_, **constants: launched.update(constants)

    monkeypatch.undo()
    monkeypatch.setattr(launch, "shrink_mixed", Recorded())
    call = Call(replace(SHAPES["plain"], in_features=8), MIXES["one adapter"])
    launch.make_h_beside(call.x, call.factors, call.work, call.width)
    assert (launched["BLOCK_K"], launched["PART_K"]) == (8, 16)


def test_usual_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert Call(SHAPES["plain"], MIXES["sixteen, one, two and one"]).error() < TOLERANCE
