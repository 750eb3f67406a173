"""All-reduce, residual addition and norm by kernels, against float64; on a CPU in Triton's interpreter.

Here the ranks run one after the other, twice: what a rank reads of those behind it is right in the second run. That
they wait for one another is tested with real ones, in `tests/distributed/norm_ranks.py`.

Tolerance, relative to the largest value: the sum over the ranks, the residual's, the quotient and its product with the
weight are rounded, each by half a unit in the last place of a number up to twice as large. With a delta each rank's x
is rounded, too: of up to eight ranks, by half a unit of a number no larger than the sum's, as much again.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bdlora_compile.runtime import linear_op, norm_op
from bdlora_compile.runtime.kernels import launch_norm, norm
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.runtime.norm_op import all_reduce_add_norm
from tests.kernels.test_gpu_operators import on_gpu, plain
from tests.kernels.test_kernels import DEVICE

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
    deltas: Sequence[Tensor | None] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """What all ranks get in an exchange."""
    boxes, ranks = mailboxes(len(xs)), len(xs)
    lines = [box[16 : 16 * (1 + norm.MAX_ROWS.value)].view(-1, 16) for box in boxes]
    results: list[tuple[Tensor, Tensor]] = []
    for _ in range(2):
        results = []
        for rank, (x, box, delta) in enumerate(zip(xs, boxes, deltas or [None] * ranks, strict=True)):
            lines[rank][:, :8], lines[rank][:, 8] = BEHIND, exchange
            results.append(launch_norm.reduce_add_norm(x, residual, weight, box, EPSILON, rank, ranks, delta))
    told = lines[0][: xs[0].shape[0], [*range(1, ranks), 8]]
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
    """The larger of two relative errors; NaN if any value is."""
    return float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(found, wanted, strict=True)]).max())


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
    assert not launch_norm.can_exchange(0, 16384, 2, 8)
    assert not launch_norm.can_exchange(128, 16384, 4, 8)
    assert not launch_norm.can_exchange(1, 64, 2, 9)


# --- with what x lacks ----------------------------------------------------------------------------------------------


def deltas_of(xs: Sequence[Tensor]) -> list[Tensor]:
    """What each rank's x lacks, in all rows that a delta has; behind those of x it is NaN."""
    rows, columns = xs[0].shape
    deltas = [torch.full((BY_TOKEN_LIMIT, columns), float("nan")).to(x) for x in xs]
    for delta in deltas:
        delta[:rows] = torch.randn(rows, columns)
    return deltas


def completed(xs: Sequence[Tensor], deltas: Sequence[Tensor]) -> list[Tensor]:
    """x + delta of each rank, exact."""
    return [x.double() + delta[: x.shape[0]].double() for x, delta in zip(xs, deltas, strict=True)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks of one process would wait for one another on a GPU")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("ranks", "rows", "columns"), [(2, 3, 64), (3, BY_TOKEN_LIMIT, 40), (8, 2, 24)])
def test_each_rank_adds_what_its_x_lacks(ranks: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    """No delta, a larger one, or another row's would be noticed."""
    xs, residual, weight = inputs(ranks, rows, columns, dtype)
    deltas = deltas_of(xs)
    found = reduce_all(xs, residual, weight, 4, deltas)
    wanted = expected(completed(xs, deltas), residual, weight)
    assert error(found[0], wanted) < 2 * TOLERANCES[dtype]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    for damage in (lambda delta: 0 * delta, lambda delta: 1.5 * delta, lambda delta: delta[:rows].roll(1, 0)):
        twin = expected(completed(xs, [*map(damage, deltas)]), residual, weight)
        assert not error(found[0], twin) < 2 * TOLERANCES[dtype]


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks of one process would wait for one another on a GPU")
def test_x_with_its_delta_is_rounded_before_the_sum() -> None:
    """To the bit what an x that lacks nothing gives; a sum of what is not rounded would be another.

    In fp16: the interpreter does not round to the nearest bf16.
    """
    dtype = torch.float16
    xs, residual, weight = inputs(3, 5, 64, dtype)
    deltas = deltas_of(xs)
    exact = completed(xs, deltas)
    found = reduce_all(xs, residual, weight, 4, deltas)[0]
    wanted = reduce_all([x.to(dtype) for x in exact], residual, weight, 4)[0]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not torch.equal(found[0], residual + torch.stack(exact).sum(0).to(dtype))


class Alone:
    """A process group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


Pair = tuple[Tensor, Tensor]


class Call:
    """Of the operator with a delta, on one rank; all-reduces that are no part of its kernel double what they get."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, dtype: torch.dtype, limits: tuple[int, int]
    ) -> None:
        monkeypatch.setattr(norm_op, "group_named", lambda _: Alone())
        monkeypatch.setattr(norm_op, "all_reduce", self._doubled)
        (self.x,), self.residual, self.weight = inputs(1, rows, columns, dtype)
        (self.mailbox,) = mailboxes(1)
        self.exchange = (self.mailbox, self.mailbox, EPSILON, *limits, "group")
        self.summands: list[Tensor] = []

    def _doubled(self, x: Tensor, *_: object) -> Tensor:
        self.summands.append(x.clone())
        return 2 * x

    def run(self, operator: Callable[..., Pair], delta: Tensor | None) -> Pair:
        """Of three dimensions, as models have them."""
        x, residual = self.x[:, None].clone(), self.residual[:, None]
        total, normed = operator(x, residual, self.weight, *self.exchange, delta)
        assert torch.equal(x[:, 0], self.x), "x is not written"
        assert total.shape == normed.shape == x.shape
        return total[:, 0], normed[:, 0]

    def wanted(self, complete: Tensor, factor: int) -> Pair:
        """In float64, of an x that lacks nothing; ``factor``: what the all-reduce makes of one."""
        return expected([factor * complete.double()], self.residual, self.weight)


FEW = 5
KERNEL, TWO_SHOT, GROUP = (1 << 20, 1 << 20), (0, 1 << 20), (0, 0)
TOO_WIDE = 16640
"""Columns: a row of them is larger than a mailbox's place."""
READ = {
    "exchanged": (FEW, 64, torch.bfloat16, KERNEL),
    "exchanged, fp16": (FEW, 64, torch.float16, KERNEL),
    "exchanged, one token": (1, 64, torch.bfloat16, KERNEL),
    "exchanged, larger than what goes one-shot alone": (FEW, 64, torch.bfloat16, (64, 1 << 20)),
    "exchanged, the most tokens": (BY_TOKEN_LIMIT, 64, torch.bfloat16, KERNEL),
    "no room": (FEW, TOO_WIDE, torch.bfloat16, KERNEL),
    "two-shot": (FEW, 64, torch.bfloat16, TWO_SHOT),
    "group": (FEW, 64, torch.bfloat16, GROUP),
    "group, the most tokens": (BY_TOKEN_LIMIT, 64, torch.bfloat16, GROUP),
}
UNREAD = {
    "exchanged": (BY_TOKEN_LIMIT + 1, 64, torch.bfloat16, KERNEL),
    "exchanged, float32": (FEW, 64, torch.float32, KERNEL),
    "no room": (130, 64, torch.bfloat16, KERNEL),
    "two-shot": (BY_TOKEN_LIMIT + 1, 64, torch.bfloat16, TWO_SHOT),
    "group": (BY_TOKEN_LIMIT + 1, 64, torch.bfloat16, GROUP),
    "group, float32": (FEW, 64, torch.float32, GROUP),
}


@pytest.mark.parametrize("runs", [on_gpu, plain])
@pytest.mark.parametrize("name", READ)
def test_the_operator_adds_what_few_tokens_lack(
    name: str, runs: Callable[..., Callable[..., Pair]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel that exchanges; elsewhere before the all-reduce, which gets the sum. Only x's rows are read."""
    rows, columns, dtype, limits = READ[name]
    call = Call(monkeypatch, rows, columns, dtype, limits)
    (delta,) = deltas_of([call.x])
    found = call.run(runs(all_reduce_add_norm), delta)
    complete = (call.x.double() + delta[:rows].double()).to(dtype)
    exchanges = name.startswith("exchanged") and runs is on_gpu
    assert int(call.mailbox[FIRST_COUNT]) == exchanges
    assert len(call.summands) == (not exchanges)
    for summand in call.summands:
        assert torch.equal(summand.view(rows, columns), complete), "what is added up lacks nothing"
    wanted = call.wanted(complete, 1 if exchanges else 2)
    assert error(found, wanted) < TOLERANCES[dtype]
    assert not error(call.run(runs(all_reduce_add_norm), None), wanted) < TOLERANCES[dtype]
    delta[rows - 1, 0] = float("nan")
    assert not error(call.run(runs(all_reduce_add_norm), delta), wanted) < TOLERANCES[dtype]


@pytest.mark.parametrize("runs", [on_gpu, plain])
@pytest.mark.parametrize("name", UNREAD)
def test_the_operator_reads_no_delta_of_more_tokens_or_in_float32(
    name: str, runs: Callable[..., Callable[..., Pair]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds anything there, here NaN; x lacks nothing."""
    rows, columns, dtype, limits = UNREAD[name]
    call = Call(monkeypatch, rows, columns, dtype, limits)
    found = call.run(runs(all_reduce_add_norm), torch.full((BY_TOKEN_LIMIT, columns), float("nan")).to(call.x))
    exchanges = name.startswith("exchanged") and runs is on_gpu
    assert int(call.mailbox[FIRST_COUNT]) == exchanges
    assert error(found, call.wanted(call.x, 1 if exchanges else 2)) < TOLERANCES[dtype]
    monkeypatch.setattr(linear_op, "has_delta", lambda _: True)
    monkeypatch.setattr(norm_op, "with_delta", lambda x, delta: x + delta[0])
    twin = call.run(runs(all_reduce_add_norm), torch.ones(rows, columns).to(call.x))
    assert not error(twin, call.wanted(call.x, 1 if exchanges else 2)) < TOLERANCES[dtype], "had it been read"
