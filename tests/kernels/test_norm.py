"""All-reduce, residual addition and norm by kernels, against float64; on a CPU in Triton's interpreter.

Here the ranks run one after the other, twice: what a rank reads of those behind it is right in the second run. That
they wait for one another is tested with real ones, in `tests/distributed/norm_ranks.py`.

Tolerance, relative to the largest value: the sum over the ranks, the residual's, the quotient and its product with the
weight are rounded, each by half a unit in the last place of a number up to twice as large.
"""

import pytest
import torch
from torch import Tensor

from bdlora_compile.runtime.kernels import launch_norm, norm
from tests.kernels.test_kernels import DEVICE

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


def reduce_all(xs: list[Tensor], residual: Tensor, weight: Tensor, exchange: int = 0) -> list[tuple[Tensor, Tensor]]:
    """What all ranks get in an exchange."""
    boxes = mailboxes(len(xs))
    lines = [box[16 : 16 * (1 + norm.MAX_ROWS.value)].view(-1, 16) for box in boxes]
    results: list[tuple[Tensor, Tensor]] = []
    for _ in range(2):
        results = []
        for rank, (x, box) in enumerate(zip(xs, boxes, strict=True)):
            lines[rank][:, :8], lines[rank][:, 8] = BEHIND, exchange
            results.append(launch_norm.reduce_add_norm(x, residual, weight, box, EPSILON, rank, len(xs)))
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


def error(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
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
    assert not error(launch_norm.add_norm(x, residual, weight, 0.1), wanted) < TOLERANCES[dtype]


def test_what_a_mailbox_has_room_for() -> None:
    """One row more, wider ones, or more ranks go another way."""
    assert launch_norm.can_exchange(128, 16384, 2, 8)
    assert not launch_norm.can_exchange(129, 16384, 2, 8)
    assert not launch_norm.can_exchange(128, 16384, 4, 8)
    assert not launch_norm.can_exchange(1, 64, 2, 9)
