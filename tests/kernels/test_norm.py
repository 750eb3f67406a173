"""All-reduce, residual addition and norm by kernels, against float64; on a CPU in Triton's interpreter.

Here the ranks run one after the other, twice: what a rank reads of those behind it is right in the second run. That
they wait for one another is tested with real ones, in `tests/distributed/norm_ranks.py`.

Tolerance, relative to the largest value: the sum over the ranks, the residual's, the quotient and its product with the
weight are rounded, each by half a unit in the last place of a number up to twice as large.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bdlora_compile.factors import LocalFactors, LocalShape
from bdlora_compile.runtime import norm_op
from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.runtime.kernels import launch_norm, norm
from bdlora_compile.runtime.kernels.launch import Factors
from bdlora_compile.runtime.linear_op import lora_linear_deferred
from bdlora_compile.runtime.norm_op import all_reduce_add_norm_expand, all_reduce_add_norm_lora
from bdlora_compile.runtime.ops import lora_work
from tests.kernels.test_gpu_operators import on_gpu, plain
from tests.kernels.test_kernels import DEVICE, NAMES, Case, bank_of

TOLERANCES = {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}
EPSILON = 1e-5
FIRST_COUNT = 16 + 8
"""The word of a mailbox that counts the exchanges of its first row."""
BEHIND = 1 << 40
"""A number that peers have told which no exchange here waits for."""


def mailboxes(ranks: int) -> list[Tensor]:
    """Those of all ranks, in which all peers have told of all exchanges."""
    boxes = [torch.zeros(norm.MAILBOX_WORDS, dtype=torch.int64, device=DEVICE) for _ in range(ranks)]
    for box in boxes:
        box[:ranks] = torch.tensor([other.data_ptr() for other in boxes])
    return boxes


def reduce_all(
    xs: list[Tensor],
    residual: Tensor,
    weight: Tensor,
    exchange: int = 0,
    ahead: launch_norm.Ahead | launch_norm.Given | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """What all ranks get in an exchange."""
    boxes = mailboxes(len(xs))
    lines = [box[16 : 16 * (1 + norm.MAX_ROWS.value)].view(-1, 16) for box in boxes]
    results: list[tuple[Tensor, Tensor]] = []
    for _ in range(2):
        results = []
        for rank, (x, box) in enumerate(zip(xs, boxes, strict=True)):
            lines[rank][:, :8], lines[rank][:, 8] = BEHIND, exchange
            results.append(launch_norm.reduce_add_norm(x, residual, weight, box, EPSILON, rank, len(xs), ahead))
    told = lines[0][: xs[0].shape[0], [*range(1, len(xs)), 8]]
    assert told.eq(exchange + 1).all(), "each peer has told the first rank, which has counted the exchange"
    return results


def inputs(ranks: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(ranks + columns)
    *xs, residual = (torch.randn(rows, columns).to(DEVICE, dtype) for _ in range(ranks + 1))
    return xs, residual, torch.linspace(0.5, 2, columns).to(DEVICE, dtype)


def expected(xs: list[Tensor], residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """In float64."""
    total = residual.double() + torch.stack([x.double() for x in xs]).sum(0)
    return total, total / (total.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()


def error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The larger of two relative errors."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks of one process would wait for one another on a GPU")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("ranks", "rows", "columns"), [(2, 3, 64), (3, 1, 40), (8, 2, 24)])
def test_all_ranks_have_the_sum_and_its_norm(ranks: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Any number of ranks and columns, even and odd exchanges; the same bits on all ranks."""
    xs, residual, weight = inputs(ranks, rows, columns, dtype)
    wanted = expected(xs, residual, weight)
    for exchange in (4, 7):
        found = reduce_all(xs, residual, weight, exchange)
        assert error(found[0], wanted) < TOLERANCES[dtype]
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    twin = expected([*xs[:-1], xs[-1].roll(1)], residual, weight)
    assert not error(found[0], twin) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_sum_that_is_there_already(dtype: torch.dtype) -> None:
    """More rows than a mailbox has; another epsilon is noticed."""
    (x,), residual, weight = inputs(1, 130, 40, dtype)
    wanted = expected([x], residual, weight)
    assert error(launch_norm.add_norm(x, residual, weight, EPSILON), wanted) < TOLERANCES[dtype]
    assert not error(launch_norm.add_norm(x, residual, weight, 1.0), wanted) < TOLERANCES[dtype]


def test_what_a_mailbox_has_room_for() -> None:
    """One row more, wider ones, or more ranks go another way."""
    assert launch_norm.can_exchange(128, 16384, 2, 8)
    assert not launch_norm.can_exchange(129, 16384, 2, 8)
    assert not launch_norm.can_exchange(128, 16384, 4, 8)
    assert not launch_norm.can_exchange(1, 64, 2, 9)


# --- with the LoRA of the product ahead -----------------------------------------------------------------------------

SLOT_RANKS = ((2, 4, 0), (8, 2, 12), (4, 24, 8))
ROWS = 4


class Product:
    """x that lacks the LoRA of a product of u: tokens of three adapters and of none."""

    def __init__(self, ranks: int, columns: int, blocks: tuple[int, int], dtype: torch.dtype, rows: int = ROWS) -> None:
        case = Case(SLOT_RANKS, 64, (32, columns, 32), *blocks, rows, 3, dtype, False)
        bank, self.dense = bank_of(case)
        self.token_slot = (torch.arange(rows, device=DEVICE) % 4 - 1).to(torch.int32).roll(1)
        self.bank = (bank.pool, bank.slots, bank.scales, self.token_slot)
        self.xs, self.residual, self.weight = inputs(ranks, rows, columns, dtype)
        self.u = torch.randn(rows, 64).to(DEVICE, dtype)

    def ahead(self) -> launch_norm.Ahead:
        pool, slots, scales, token_slot = self.bank
        return launch_norm.Ahead(self.u, Factors(pool, slots, token_slot, [1]), scales, 24)

    def wanted(self, token_slot: Tensor) -> tuple[Tensor, Tensor]:
        """In float64, each rank's LoRA the same."""
        added = torch.zeros(self.residual.shape, dtype=torch.float64)
        for token, slot in enumerate(token_slot.tolist()):
            if slot >= 0:
                added[token] = self.dense[slot, 1] @ self.u[token].double().cpu()
        return expected([x.double() + added.to(DEVICE) for x in self.xs], self.residual, self.weight)


LORA_CASES = {
    "one block": (64, (1, 1), 4096),
    "packed": (64, (4, 1), 4096),
    "several turns": (96, (2, 1), 32),
    "odd columns": (36, (1, 1), 4096),
    "packed B": (64, (1, 2), 4096),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks of one process would wait for one another on a GPU")
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", LORA_CASES)
def test_lora_of_the_product_ahead(name: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is added to each rank's x before the sum; tokens with another slot would be noticed."""
    columns, blocks, elements = LORA_CASES[name]
    for of in ("_ELEMENTS_OF_A", "_ELEMENTS_OF_B"):
        monkeypatch.setattr(launch_norm, of, elements)
    product = Product(ranks, columns, blocks, torch.bfloat16)
    found = reduce_all(product.xs, product.residual, product.weight, 4, product.ahead())
    assert error(found[0], product.wanted(product.token_slot)) < 2 * TOLERANCES[torch.bfloat16], "x is rounded, too"
    assert not error(found[0], product.wanted(product.token_slot.roll(1))) < 8 * TOLERANCES[torch.bfloat16]
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


class Alone:
    """A process group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("rows", "limit", "dtype"),
    [
        (ROWS, 1 << 20, torch.bfloat16),
        (ROWS, 0, torch.bfloat16),
        (70, 1 << 20, torch.bfloat16),
        (ROWS, 1 << 20, torch.float32),
    ],
    ids=["exchanged", "apart", "many tokens", "float32"],
)
def test_the_operator(rows: int, limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on GPUs: of few tokens the LoRA is here that their product left out."""
    monkeypatch.setattr(norm_op, "group_named", lambda _: Alone())
    monkeypatch.setattr(norm_op, "all_reduce", lambda x, *_: x)
    product = Product(1, 64, (2, 1), dtype, rows)
    weight, (order, segments) = torch.zeros(64, 64).to(DEVICE, dtype), lora_work(product.u, product.token_slot)
    lora = ([1], 24)
    x = lora_linear_deferred(product.u, weight, *product.bank, order, segments, *lora, [64])
    is_few = rows == ROWS and dtype is torch.bfloat16
    assert bool(x.any()) is not is_few
    (mailbox,) = mailboxes(1)
    exchange = (mailbox, mailbox, EPSILON, limit, limit, "group")
    run = on_gpu(all_reduce_add_norm_lora)
    shape = (2, -1, 64)
    values = [value.view(shape) for value in (x, product.residual)]
    found = run(*values, product.weight, *exchange, product.u.view(shape), *product.bank, *lora)
    product.xs = [torch.zeros_like(product.u)]
    assert error(found, [value.view(shape) for value in product.wanted(product.token_slot)]) < 2 * TOLERANCES[dtype]
    assert int(mailbox[FIRST_COUNT]) == (limit > 0), "by the kernel that exchanges"
    twin = product.wanted(product.token_slot.roll(1))
    assert not error(found, [value.view(shape) for value in twin]) < 8 * TOLERANCES[dtype]


# --- with a given h -------------------------------------------------------------------------------------------------

RANKS_OF_B = (8, 4, 24)
WIDTH = 24
NO_RANK = len(RANKS_OF_B)
"""A slot that has nothing at the site."""


@dataclass(frozen=True)
class Form:
    """Which columns B writes, how it is packed, and how many elements of it a warp holds at once."""

    columns: int = 64
    size: int = 64
    start: int = 0
    blocks: int = 1
    parts: int = 1
    elements: int = 4096


class ProductOfH:
    """x that lacks B h: tokens of three adapters, of one that has none at the site, and of none; h holds NaN elsewhere.

    ``halves`` [planes, T, WIDTH]: each token's h without gaps, as far as its slot's rank goes.
    """

    def __init__(self, form: Form, ranks: int, planes: int, dtype: torch.dtype, rows: int = 5) -> None:
        self.form = form
        self.xs, self.residual, self.weight = inputs(ranks, rows, form.columns, dtype)
        bank, self.b = AdapterBank(NAMES, NO_RANK + 1, 20000, 256, dtype, DEVICE), {}
        for slot, rank in enumerate(RANKS_OF_B):
            shape = LocalShape(rank // form.parts, rank, 1, form.blocks, 16, form.size, form.start)
            a = torch.randn(shape.a_rank, 16).to(dtype)
            b = torch.randn(rank, form.size // form.blocks).to(dtype)
            self.b[slot] = torch.block_diag(*b.double().chunk(form.blocks))
            staged = bank.stage({NAMES[1]: (LocalFactors(shape, a, b), 0.25 * (slot + 1))})
            bank.write(slot, staged, bank.used_elements())
        self.token_slot = (torch.arange(rows, device=DEVICE) % 5 - 1).to(torch.int32).roll(2)
        self.bank = (bank.pool, bank.slots, bank.scales, self.token_slot)
        self.halves = torch.randn(planes, rows, WIDTH)
        self.h = self._spread()

    def _spread(self) -> Tensor:
        """[planes, T, parts, width] with each token's shares."""
        planes, rows, _ = self.halves.shape
        h = torch.full((planes, rows, self.form.parts, WIDTH), float("nan"))
        for token, slot in enumerate(self.token_slot.tolist()):
            rank = RANKS_OF_B[slot] if 0 <= slot < NO_RANK else 0
            share = rank // self.form.parts
            h[:, token, :, :share] = self.halves[:, token, :rank].reshape(planes, self.form.parts, share)
        return h.to(DEVICE)

    def given(self) -> launch_norm.Given:
        pool, slots, scales, token_slot = self.bank
        return launch_norm.Given(self.h, Factors(pool, slots, token_slot, [1]), scales, self.form.size, self.form.parts)

    def wanted(self, token_slot: Tensor, halves: Tensor, factor: float = 1) -> tuple[Tensor, Tensor]:
        """In float64, each rank's LoRA the same."""
        form, h = self.form, halves.double().sum(0)
        added = torch.zeros(len(token_slot), form.start + form.size, dtype=torch.float64)
        for token, slot in enumerate(token_slot.tolist()):
            if 0 <= slot < NO_RANK:
                scaled = factor * 0.25 * (slot + 1) * h[token, : RANKS_OF_B[slot]]
                added[token, form.start :] = scaled @ self.b[slot]
        room = torch.zeros(self.residual.shape, dtype=torch.float64)
        written = min(form.columns, form.start + form.size)
        room[:, :written] = added[:, :written]
        return expected([x.double() + room.to(DEVICE) for x in self.xs], self.residual, self.weight)


FORMS = {
    "one block": Form(),
    "several turns": Form(elements=32),
    "a slice": Form(size=16, start=32),
    "columns cut": Form(size=48, start=32, elements=32),
    "2 parts": Form(parts=2),
    "4 parts, several turns": Form(size=16, start=16, parts=4, elements=32),
    "packed B": Form(blocks=2),
    "packed, columns cut, 2 parts": Form(size=48, start=32, blocks=4, parts=2),
    "odd columns": Form(columns=36, size=36),
    "odd slice, columns cut": Form(columns=36, size=9, start=29, parts=4),
    "odd start": Form(size=16, start=5),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks of one process would wait for one another on a GPU")
@pytest.mark.parametrize(("ranks", "planes"), [(1, 3), (2, 1)])
@pytest.mark.parametrize("name", FORMS)
def test_lora_of_a_given_h(name: str, ranks: int, planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """B h is added to each rank's x before the sum; another slot, scale or h of the tokens would be noticed."""
    monkeypatch.setattr(launch_norm, "_ELEMENTS_OF_B", FORMS[name].elements)
    product = ProductOfH(FORMS[name], ranks, planes, torch.bfloat16)
    found = reduce_all(product.xs, product.residual, product.weight, 4, product.given())
    right, halves = product.token_slot, product.halves
    assert error(found[0], product.wanted(right, halves)) < 2 * TOLERANCES[torch.bfloat16], "x is rounded, too"
    for twin in (
        product.wanted(right.roll(1), halves),
        product.wanted(right, halves.roll(1, dims=1)),
        product.wanted(right, halves, factor=2),
    ):
        assert not error(found[0], twin) < 8 * TOLERANCES[torch.bfloat16]
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


def test_a_program_holds_no_more_rows_than_a_slot_has() -> None:
    """The shares of all parts count; of wide rows fewer are held."""
    product = ProductOfH(Form(parts=4), 1, 1, torch.bfloat16)
    assert launch_norm._lora(product.given(), 4096, 16)["ROWS"] == 16
    assert launch_norm._lora(product.given(), 64, 4)["ROWS"] == 128, "4 parts of 24, as a power of two"


@pytest.mark.parametrize(
    ("rows", "limit", "dtype"),
    [
        (5, 1 << 20, torch.bfloat16),
        (5, 0, torch.bfloat16),
        (70, 1 << 20, torch.bfloat16),
        (5, 1 << 20, torch.float32),
    ],
    ids=["exchanged", "apart", "many tokens", "float32"],
)
def test_the_operator_with_a_given_h(
    rows: int, limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on GPUs against what runs elsewhere: of few tokens h is read, and x itself is not written."""
    monkeypatch.setattr(norm_op, "group_named", lambda _: Alone())
    monkeypatch.setattr(norm_op, "all_reduce", lambda x, *_: x.clone())
    form = Form(size=48, start=32, parts=2)
    product = ProductOfH(form, 1, 3, dtype, rows)
    (mailbox,) = mailboxes(1)
    exchange = (mailbox, mailbox, EPSILON, limit, limit, "group")
    shape = (5, -1, 64)
    x, residual = (value.view(shape) for value in (product.xs[0], product.residual))
    before = x.clone()

    def run(operator: Callable[..., tuple[Tensor, Tensor]], h: Tensor) -> tuple[Tensor, Tensor]:
        return operator(x, residual, product.weight, *exchange, h, *product.bank, [1], [form.size], form.parts)

    is_few = rows == 5 and dtype is torch.bfloat16
    wanted = run(plain(all_reduce_add_norm_expand), product.h)
    assert error(run(on_gpu(all_reduce_add_norm_expand), product.h), wanted) < 2 * TOLERANCES[dtype]
    halves = product.halves if is_few else 0 * product.halves
    exact = [value.view(shape) for value in product.wanted(product.token_slot, halves)]
    assert error(wanted, exact) < 2 * TOLERANCES[dtype]
    twin = run(on_gpu(all_reduce_add_norm_expand), 2 * product.h)
    assert int(mailbox[FIRST_COUNT]) == 2 * (limit > 0), "by the kernel that exchanges"
    assert (error(twin, wanted) < 8 * TOLERANCES[dtype]) is not is_few
    assert torch.equal(x, before)
