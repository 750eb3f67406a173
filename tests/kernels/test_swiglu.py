"""silu(gate) * up of a product and what it lacks, in float64; on a CPU in Triton's interpreter.

Tolerance, relative to the largest value: gate, up, silu(gate) and the result are rounded to fp16, each by half a unit
in the last place (2^-11).
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bdlora_compile.runtime.kernels import launch_swiglu
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.runtime.swiglu_op import swiglu
from tests.kernels.test_kernels import DEVICE, error

TOLERANCE = 4 * 2.0**-11
TOKENS = 5


@dataclass(frozen=True)
class Case:
    """Columns of gate and of up, and those of a program."""

    features: int
    columns: int


CASES = {
    "one program": Case(64, 64),
    "several programs": Case(96, 32),
    "a last program that is not full": Case(144, 64),
    "odd": Case(37, 64),
    "odd, several programs": Case(77, 32),
    "one column behind a program's": Case(33, 32),
    "one column": Case(1, 64),
    "usual programs": Case(2056, launch_swiglu._COLUMNS),
    "usual programs, odd": Case(2051, launch_swiglu._COLUMNS),
}


class Call:
    """A case with random inputs, and what is wanted in float64. NaN is what nobody may read."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.features)
        self.features = case.features
        self.gate_up = torch.randn(TOKENS, 2 * case.features).to(DEVICE, torch.float16)
        self.delta = torch.randn(BY_TOKEN_LIMIT, 2 * case.features).to(DEVICE, torch.float16)
        self.delta[TOKENS:] = torch.nan

    def run(self, *, adds: bool = True) -> Tensor:
        """By the kernel, which writes m and nothing behind it."""
        room = torch.full((TOKENS + 1, self.features), 7.0, dtype=torch.float16, device=DEVICE)
        room[:TOKENS] = torch.nan
        launch_swiglu.swiglu(self.gate_up, room[:TOKENS], self.delta if adds else None)
        assert room[TOKENS].eq(7).all()
        return room[:TOKENS]

    def wanted(self, *, adds: bool = True) -> Tensor:
        y = self.gate_up.double().cpu()
        if adds:
            y = y + self.delta[:TOKENS].double().cpu()
        gate, up = y.chunk(2, dim=1)
        return gate * gate.sigmoid() * up


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Call:
    case = CASES[request.param]
    monkeypatch.setattr(launch_swiglu, "_COLUMNS", case.columns)
    return Call(case)


@pytest.mark.parametrize("adds", [True, False], ids=["with_delta", "without"])
def test_activation_equals_that_in_float64(call: Call, adds: bool) -> None:
    m = call.run(adds=adds)
    assert error(m, call.wanted(adds=adds)) < TOLERANCE
    assert not error(m, call.wanted(adds=not adds)) < 10 * TOLERANCE, "the twin: delta is no small part of it"


@pytest.mark.parametrize("damage", ["scale", "token", "halves", "column", "gate", "up"])
def test_damage_is_noticed(call: Call, damage: str) -> None:
    """The twins: delta scaled, another token's, up's for gate's, one column on, left out at gate or at up."""
    wanted, halves = call.wanted(), call.delta.chunk(2, dim=1)
    if damage == "scale":
        call.delta *= 1.05
    elif damage == "token":
        call.delta[:TOKENS] = call.delta[:TOKENS].roll(1, dims=0)
    elif damage == "halves":
        call.delta = torch.cat(halves[::-1], dim=1)
    elif damage == "column":
        call.delta = call.delta.roll(1, dims=1)
    else:
        halves[damage == "up"].zero_()
    assert not error(call.run(), wanted) < TOLERANCE


def test_no_tokens() -> None:
    delta = torch.full((BY_TOKEN_LIMIT, 16), torch.nan, dtype=torch.float16, device=DEVICE)
    gate_up, m = delta[:0], delta.new_empty(0, 8)
    launch_swiglu.swiglu(gate_up, m, delta)
    assert m.shape == (0, 8)


@pytest.mark.parametrize("shape", [(5, 1), (2, 8), (65, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_operator_is_what_it_says_to_the_compiler(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Also where nothing lies beside the product: of more tokens, or of another dtype."""
    y, delta = torch.randn(*shape, 22, dtype=dtype), torch.randn(BY_TOKEN_LIMIT, 22, dtype=dtype)
    torch.library.opcheck(swiglu, (y, delta))
