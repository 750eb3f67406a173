"""All-reduce, residual addition and norm by kernels, against float64; on a CPU in Triton's interpreter.

Here the ranks run one after the other, twice: what a rank reads of those behind it is right in the second run. That
they wait for one another is tested with real ones, in `tests/distributed/norm_ranks.py`.

Tolerance, relative to the largest value: the sum over the ranks, the residual's, the quotient and its product with the
weight are rounded, each by half a unit in the last place of a number up to twice as large.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bdlora_compile.runtime import norm_op
from bdlora_compile.runtime.kernels import launch_norm, norm
from bdlora_compile.runtime.kernels.launch import Factors
from bdlora_compile.runtime.linear_op import lora_linear_deferred
from bdlora_compile.runtime.norm_op import all_reduce_add_norm_lora
from bdlora_compile.runtime.ops import lora_work
from tests.kernels.test_gpu_operators import on_gpu
from tests.kernels.test_kernels import DEVICE, Case, bank_of

TOLERANCES = {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}
EPSILON = 1e-5
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
    ahead: launch_norm.Ahead | None = None,
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
    twin = product.wanted(product.token_slot.roll(1))
    assert not error(found, [value.view(shape) for value in twin]) < 8 * TOLERANCES[dtype]
