"""A base product and its LoRA in one launch, against dense products in float64; on a CPU in Triton's interpreter.

Tolerance as in `test_kernels`: only y is rounded. fp16, since the interpreter multiplies the bits of bf16 operands.
"""

import pytest
import torch
from torch import Tensor

from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.runtime.kernels import launch
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT, Call, Product, default_product
from bdlora_compile.runtime.linear_op import (
    NUM_COUNTERS,
    lora_counters,
    lora_linear,
    lora_linear_beside,
    lora_no_delta,
    with_delta,
)
from bdlora_compile.runtime.ops import lora_work
from tests.kernels.test_kernels import DEVICE, Case, bank_of, error, expected, factors_of, inputs

TOLERANCE = 4 * 2.0**-11
SHARED = Product(columns=16, depth=16, splits=2, stages=1)
ALONE = Product(columns=32, depth=32, splits=1, stages=1)
AHEAD = Product(columns=16, depth=16, splits=2, stages=1, warps=1, ahead=True)
PLANS = [SHARED, ALONE, AHEAD]
RANKS = ((2, 4, 0), (8, 2, 3), (4, 4, 8))
CASES = {
    "plain": Case(RANKS, 64, (64, 32, 32), 1, 1, 5, 3, torch.float16, True),
    "packed A": Case(RANKS, 64, (64, 32, 32), 2, 1, 16, 4, torch.float16, False),
    "packed B": Case(RANKS, 64, (64, 32, 32), 1, 2, 1, 5, torch.float16, False),
    "wide": Case(((16, 12, 9),), 64, (64, 32, 32), 1, 1, 3, 6, torch.float16, False),
    "many rows of B": Case(((64, 3, 33), (2, 0, 5)), 32, (64, 32, 32), 1, 1, 4, 8, torch.float16, False),
    "many rows of B, packed": Case(((64, 4, 32), (2, 0, 8)), 32, (64, 32, 32), 1, 2, 3, 9, torch.float16, False),
    "many tokens": Case(RANKS, 32, (64, 32, 32), 1, 1, 18, 10, torch.float16, True),
}


def prepared(case: Case) -> tuple[AdapterBank, Tensor, Tensor, Tensor]:
    """(bank with the tokens' slots, x, W, what is wanted)."""
    bank, dense = bank_of(case)
    x, _, slots = inputs(case)
    bank.token_slot[: case.tokens] = slots.to(torch.int32)
    weight = (torch.randn(sum(case.out_features), case.in_features) / 4).to(DEVICE, case.dtype)
    return bank, x, weight, expected(case, x, x.double() @ weight.double().t(), slots, dense)


def run(case: Case, bank: AdapterBank, x: Tensor, weight: Tensor, counters: Tensor, plan: Product) -> Tensor:
    """y by the kernel."""
    factors = factors_of(bank, case)
    return launch.linear(x, weight, factors, bank.scales, counters, case.width, case.out_features, plan)


@pytest.mark.parametrize("plan", PLANS, ids=["shared sums", "one program a tile", "h made ahead"])
@pytest.mark.parametrize("name", CASES)
def test_product_with_lora_equals_dense_products(name: str, plan: Product) -> None:
    """And the counters are zero again, as the next launch wants them."""
    case = CASES[name]
    bank, x, weight, wanted = prepared(case)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=DEVICE)
    assert error(run(case, bank, x, weight, counters, plan), wanted) < TOLERANCE
    assert not counters.any()


@pytest.mark.parametrize("plan", [SHARED, AHEAD], ids=["h made here", "h made ahead"])
@pytest.mark.parametrize("damage", ["scale", "token", "offset"])
def test_damage_is_noticed(damage: str, plan: Product) -> None:
    """The twins: a scale dropped, a token with another slot, a factor read one row off."""
    case = CASES["plain"]
    bank, x, weight, wanted = prepared(case)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=DEVICE)
    if damage == "scale":
        bank.scales.fill_(1)
    elif damage == "token":
        bank.token_slot[: case.tokens] = (bank.token_slot[: case.tokens] + 2) % len(RANKS)
    else:
        bank.slots[0, :, 0] += case.in_features
    assert not error(run(case, bank, x, weight, counters, plan), wanted) < 0.02


def test_operator_serves_any_device_and_shape() -> None:
    """Without a plan the operator is the product, then LoRA: base rounded first."""
    case = CASES["plain"]
    bank, x, weight, wanted = prepared(case)
    tokens = bank.token_slot[: case.tokens]
    order, segments = lora_work(x, tokens)
    shared = (bank.pool, bank.slots, bank.scales, tokens, order, segments, lora_counters(tokens))
    found = lora_linear(x, weight, *shared, [0, 1, 2], case.width, case.out_features)
    assert error(found, wanted) < TOLERANCE


@pytest.mark.parametrize("name", ["plain", "many tokens"])
def test_a_product_and_what_lies_beside_it_equal_dense_products(name: str) -> None:
    """On any device. Of many tokens nothing lies beside it."""
    case = CASES[name]
    bank, x, weight, wanted = prepared(case)
    tokens = bank.token_slot[: case.tokens]
    shared = (bank.pool, bank.slots, bank.scales, tokens, *lora_work(x, tokens), [0, 1, 2], case.width)
    y, delta = lora_linear_beside(x, weight, *shared, case.out_features)
    assert error(with_delta(y, delta), wanted) < TOLERANCE
    # The twins: left out, and another token's. Of many tokens neither is noticed.
    for found in (y, with_delta(y, delta.roll(1, dims=0))):
        assert (error(found, wanted) < TOLERANCE) is (case.tokens > BY_TOKEN_LIMIT)


def test_one_site_may_write_some_columns_of_a_product() -> None:
    """The others lack nothing."""
    case = CASES["wide"]
    bank, x, weight, _ = prepared(case)
    tokens = bank.token_slot[: case.tokens]
    shared = (bank.pool, bank.slots, bank.scales, tokens, *lora_work(x, tokens))
    y, delta = lora_linear_beside(x, weight, *shared, [0], case.width, case.out_features[:1])
    assert error(y, x.double() @ weight.double().t()) < TOLERANCE
    assert delta[: case.tokens, : case.out_features[0]].any()
    assert not delta[: case.tokens, case.out_features[0] :].any()


def test_what_lacks_nothing_has_a_delta_of_zeros() -> None:
    x = torch.randn(2, 3, 24, dtype=torch.float16, device=DEVICE)
    torch.library.opcheck(lora_no_delta, (x,))
    assert torch.equal(with_delta(x, lora_no_delta(x)), x)


SMALL = [(4096, (512, 128, 128)), (512, (4096,)), (4096, (1792, 1792)), (8192, (1024, 128, 128))]
LARGE = [(8192, (3584, 3584)), (3584, (8192,)), (14336, (4096,)), (4096, (14336, 14336))]


@pytest.mark.parametrize(
    ("shapes", "tokens", "width", "ahead"),
    [
        pytest.param(SMALL, 16, 8, False, id="narrow"),
        pytest.param(SMALL, 16, 64, True, id="wide"),
        pytest.param(LARGE, 16, 8, True, id="large"),
        pytest.param(SMALL, 17, 2, True, id="more tokens"),
    ],
)
def test_default_products(shapes: list[tuple[int, tuple[int, ...]]], tokens: int, width: int, ahead: bool) -> None:
    """Enough programs, all at once; sizes that tiles divide; h ahead where it is more work or W is large."""
    for in_features, outs in shapes:
        plan = default_product(Call(tokens, in_features, outs, width))
        assert plan is not None
        assert plan.ahead == ahead
        assert 100 < sum(outs) // plan.columns * plan.splits <= 528
        assert in_features % (plan.splits * plan.depth) == 0
        assert sum(outs) // plan.columns + 2 <= NUM_COUNTERS


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(Call(17, 4096, (4096,), 8), id="more tokens and rank"),
        pytest.param(Call(65, 4096, (4096,), 2), id="many tokens"),
        pytest.param(Call(16, 4096, (4100,), 8), id="columns of y"),
        pytest.param(Call(16, 100, (4096,), 8), id="columns of x"),
        pytest.param(Call(16, 100, (4096,), 64), id="columns of x, wide"),
        pytest.param(Call(16, 64, (16,), 2), id="a tiny layer"),
    ],
)
def test_other_products_and_their_lora_are_two_launches(call: Call) -> None:
    assert default_product(call) is None
