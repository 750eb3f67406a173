"""A base product and its LoRA as one operator or beside each other, against dense products in float64.

By the kernels, on a CPU in Triton's interpreter, and by the plain implementations. Tolerance as in `test_kernels`: only
y and what is added to it are rounded. fp16, since the interpreter multiplies the bits of bf16 operands.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.runtime.linear_op import lora_linear, lora_linear_beside, lora_no_delta, with_delta
from bdlora_compile.runtime.ops import lora_apply_, lora_shrink, lora_work
from tests.kernels.test_gpu_operators import on_gpu, plain
from tests.kernels.test_kernels import DEVICE, Case, bank_of, error, expected, inputs

Run = Callable[..., Callable[..., Any]]
TOLERANCE = 4 * 2.0**-11
RANKS = ((2, 4, 0), (8, 2, 3), (4, 4, 8))
CASES = {
    "plain": Case(RANKS, 64, (64, 32, 32), 1, 1, 5, 3, torch.float16, True),
    "packed A": Case(RANKS, 64, (64, 32, 32), 2, 1, 16, 4, torch.float16, False),
    "packed B": Case(RANKS, 64, (64, 32, 32), 1, 2, 1, 5, torch.float16, False),
    "wide": Case(((16, 12, 9),), 64, (64, 32, 32), 1, 1, 3, 6, torch.float16, False),
    "many rows of B": Case(((64, 3, 33), (2, 0, 5)), 32, (64, 32, 32), 1, 1, 4, 8, torch.float16, False),
    "many rows of B, packed": Case(((64, 4, 32), (2, 0, 8)), 32, (64, 32, 32), 1, 2, 3, 9, torch.float16, False),
    "grouped": Case(RANKS, 64, (64, 32, 32), 1, 1, 40, 11, torch.float16, True),
    "grouped, packed A": Case(RANKS, 64, (64, 32, 32), 2, 1, 17, 12, torch.float16, False),
    "grouped, wide": Case(((16, 12, 9),), 64, (64, 32, 32), 1, 1, BY_TOKEN_LIMIT, 13, torch.float16, False),
    "many tokens": Case(RANKS, 32, (64, 32, 32), 1, 1, BY_TOKEN_LIMIT + 2, 10, torch.float16, True),
}


def prepared(case: Case) -> tuple[AdapterBank, Tensor, Tensor, Tensor]:
    """(bank with the tokens' slots, x, W, what is wanted)."""
    bank, dense = bank_of(case)
    x, _, slots = inputs(case)
    bank.token_slot[: case.tokens] = slots.to(torch.int32)
    weight = (torch.randn(sum(case.out_features), case.in_features) / 4).to(DEVICE, case.dtype)
    return bank, x, weight, expected(case, x, x.double() @ weight.double().t(), slots, dense)


def operands(case: Case, bank: AdapterBank, x: Tensor) -> tuple[Any, ...]:
    """What the operators take behind W."""
    tokens = bank.token_slot[: case.tokens]
    work = on_gpu(lora_work)(x, tokens)
    return bank.pool, bank.slots, bank.scales, tokens, *work, [0, 1, 2], case.width, case.out_features


@pytest.mark.parametrize("runs", [on_gpu, plain])
@pytest.mark.parametrize("name", CASES)
def test_product_with_lora_equals_dense_products(name: str, runs: Run) -> None:
    case = CASES[name]
    bank, x, weight, wanted = prepared(case)
    assert error(runs(lora_linear)(x, weight, None, *operands(case, bank, x)), wanted) < TOLERANCE


@pytest.mark.parametrize("runs", [on_gpu, plain])
@pytest.mark.parametrize("damage", ["scale", "token", "offset"])
def test_damage_is_noticed(damage: str, runs: Run) -> None:
    """The twins: a scale dropped, a token with another slot, a factor read one row off."""
    case = CASES["plain"]
    bank, x, weight, wanted = prepared(case)
    if damage == "scale":
        bank.scales.fill_(1)
    elif damage == "token":
        bank.token_slot[: case.tokens] = (bank.token_slot[: case.tokens] + 2) % len(RANKS)
    else:
        bank.slots[0, :, 0] += case.in_features
    assert not error(runs(lora_linear)(x, weight, None, *operands(case, bank, x)), wanted) < 0.02


@pytest.mark.parametrize("runs", [on_gpu, plain])
def test_sites_may_write_some_columns_of_a_product(runs: Run) -> None:
    """The others are the product alone; nothing lies beside such a product."""
    case = CASES["plain"]
    bank, x, weight, wanted = prepared(case)
    *shared, _, width, outs = operands(case, bank, x)
    found = runs(lora_linear)(x, weight, None, *shared, [0, 1], width, outs[:2])
    written = sum(outs[:2])
    assert error(found[:, :written], wanted[:, :written]) < TOLERANCE
    assert error(found[:, written:], x.double() @ weight[written:].double().t()) < TOLERANCE


@pytest.mark.parametrize("runs", [on_gpu, plain])
@pytest.mark.parametrize("name", CASES)
def test_a_product_and_what_lies_beside_it_equal_dense_products(name: str, runs: Run) -> None:
    """Of many tokens nothing lies beside it."""
    case = CASES[name]
    bank, x, weight, wanted = prepared(case)
    y, delta = runs(lora_linear_beside)(x, weight, None, *operands(case, bank, x))
    assert error(with_delta(y, delta), wanted) < TOLERANCE
    # The twins: left out, and another token's. Of many tokens neither is noticed.
    for found in (y, with_delta(y, delta.roll(1, dims=0))):
        assert (error(found, wanted) < TOLERANCE) is (case.tokens > BY_TOKEN_LIMIT)


@pytest.mark.parametrize("runs", [on_gpu, plain])
def test_one_site_may_write_some_columns_of_a_product(runs: Run) -> None:
    """The others lack nothing."""
    case = CASES["wide"]
    bank, x, weight, _ = prepared(case)
    *shared, _, width, outs = operands(case, bank, x)
    y, delta = runs(lora_linear_beside)(x, weight, None, *shared, [0], width, outs[:1])
    assert error(y, x.double() @ weight.double().t()) < TOLERANCE
    assert delta[: case.tokens, : case.out_features[0]].any()
    assert not delta[: case.tokens, case.out_features[0] :].any()


@pytest.mark.parametrize("name", ["plain", "grouped", "many tokens"])
def test_columns_of_x_may_be_strided(name: str) -> None:
    bank, x, weight, wanted = prepared(CASES[name])
    turned = x.t().contiguous().t()
    assert turned.stride(-1) > 1
    assert error(on_gpu(lora_linear)(turned, weight, None, *operands(CASES[name], bank, x)), wanted) < TOLERANCE


@pytest.mark.parametrize(("place", "name"), [(0, "pool"), (1, "slots"), (3, "token_slot")])
def test_strides_that_kernels_do_not_expect_are_refused(place: int, name: str) -> None:
    """They would read other elements."""
    case = CASES["plain"]
    bank, x, weight, _ = prepared(case)
    arguments = list(operands(case, bank, x))
    arguments[place] = torch.stack([arguments[place]] * 2, dim=-1)[..., 0]
    with pytest.raises(ValueError, match=f"{name} has shape .* and strides .*expect it contiguous"):
        on_gpu(lora_linear)(x, weight, None, *arguments)


@pytest.mark.parametrize("tokens", [BY_TOKEN_LIMIT, BY_TOKEN_LIMIT + 2])
def test_h_may_be_larger_than_fp16(tokens: int) -> None:
    """Whatever form kernels take, and so whatever else is in the batch."""
    case = replace(CASES["many tokens"], tokens=tokens)
    bank, x, weight, _ = prepared(case)
    x, largest = 400 * x, torch.finfo(torch.float16).max
    bank.pool *= 64
    bank.scales /= 64**2
    h = on_gpu(lora_shrink)(x, bank.pool, bank.slots, bank.token_slot[:tokens], [0, 1, 2], case.width)
    assert largest < h.abs().max() < 2 * largest
    found = x @ weight.t()
    wanted = found.clone()
    for y, run in ((found, on_gpu(lora_apply_)), (wanted, plain(lora_apply_))):
        run(x, y, *operands(case, bank, x))
    assert error(found, wanted.double()) < TOLERANCE


def test_what_lacks_nothing_has_a_delta_of_zeros() -> None:
    x = torch.randn(2, 3, 24, dtype=torch.float16, device=DEVICE)
    torch.library.opcheck(lora_no_delta, (x,))
    assert torch.equal(with_delta(x, lora_no_delta(x)), x)
