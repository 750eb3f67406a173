"""All-reduce, residual addition and norm by kernels, against float64; on a CPU in Triton's interpreter.

Here units, ranks and parts of rows, run one after the other, and all of them three times: what a unit reads of its
peers is right in the second run, and what it reads of the other parts of its row in the one behind. That ranks wait for
one another is tested with real ones, in `tests/distributed/norm_ranks.py`.

Tolerance, relative to the largest value: the sum over the ranks, the residual's, the quotient and its product with the
weight are rounded, each by half a unit in the last place of a number up to twice as large. h is held against the norm
of the sum that was found, so only sums of up to 96 products in float32 are rounded: 2^-24 of their magnitudes each,
which add up to some ten times the largest h.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bdlora_compile.runtime import norm_op
from bdlora_compile.runtime.kernels import launch_norm, norm
from bdlora_compile.runtime.kernels.launch import Factors
from bdlora_compile.runtime.norm_op import all_reduce_add_norm_lora
from bdlora_compile.runtime.ops import SlotField, lora_shrink
from tests.kernels.test_gpu_operators import on_gpu, plain
from tests.kernels.test_kernels import DEVICE, Case, bank_of

TOLERANCES = {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}
H_TOLERANCE = 10 * 96 * 2.0**-24
EPSILON = 1e-5
BEHIND = 1 << 40
"""A number that peers have told which no exchange here waits for."""
ONE = (1 << 32) + 0x3F800000
"""1.0 with a mark, which is the sum of no unit's squares here."""
UNITS = norm.MAX_ROWS.value

one_process = pytest.mark.skipif(
    torch.cuda.is_available(), reason="ranks of one process would wait for one another on a GPU"
)


class Boxes:
    """Mailboxes of all ranks, in which all peers have told of all exchanges, and rows' units have left some squares.

    Units have had ``exchange`` to ``exchange + 2`` exchanges.
    """

    def __init__(self, ranks: int, exchange: int = 0) -> None:
        self.boxes = [torch.zeros(norm.MAILBOX_WORDS, dtype=torch.int64, device=DEVICE) for _ in range(ranks)]
        self.lines = [box[16 : 16 * (1 + UNITS)].view(UNITS, 16) for box in self.boxes]
        self.squares = [box[16 * (1 + UNITS) : 16 * (1 + 2 * UNITS)].view(UNITS, 16) for box in self.boxes]
        self.numbers = exchange + torch.arange(UNITS, device=DEVICE) % 3
        for box, squares in zip(self.boxes, self.squares, strict=True):
            box[:ranks] = torch.tensor([other.data_ptr() for other in self.boxes])
            if DEVICE.type == "cpu":
                squares[:, :8] = ONE

    def ready(self) -> Iterator[tuple[int, Tensor]]:
        """(rank, its mailbox), once for each of the runs, each as if nothing had been exchanged."""
        for _ in range(2 if len(self.boxes) == 1 else 3):
            for rank, (box, lines) in enumerate(zip(self.boxes, self.lines, strict=True)):
                lines[:, :8], lines[:, 8] = BEHIND, self.numbers
                yield rank, box

    def check_told(self, units: int) -> None:
        """Each peer has told the first rank, which has counted the exchange."""
        told = self.lines[0][:units, [*range(1, len(self.boxes)), 8]]
        assert told.eq(self.numbers[:units, None] + 1).all()
        assert self.lines[0][units:, 8].equal(self.numbers[units:])


def reduce_all(xs: list[Tensor], residual: Tensor, weight: Tensor, exchange: int = 0) -> list[tuple[Tensor, Tensor]]:
    """What all ranks get in an exchange."""
    boxes, results = Boxes(len(xs), exchange), []
    for rank, box in boxes.ready():
        results.append(launch_norm.reduce_add_norm(xs[rank], residual, weight, box, EPSILON, rank, len(xs)))
    rows, columns = residual.shape
    boxes.check_told(rows * launch_norm.parts_of(rows, columns))
    return results[-len(xs) :]


def inputs(ranks: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(ranks + columns)
    *xs, residual = (torch.randn(rows, columns).to(DEVICE, dtype) for _ in range(ranks + 1))
    return xs, residual, torch.linspace(0.5, 2, columns).to(DEVICE, dtype)


def norm_of(total: Tensor, weight: Tensor) -> Tensor:
    """In float64."""
    total = total.double()
    return total / (total.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()


def expected(xs: list[Tensor], residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """In float64."""
    total = residual.double() + torch.stack([x.double() for x in xs]).sum(0)
    return total, norm_of(total, weight)


def error(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


@one_process
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("ranks", "rows", "columns", "parts"), [(2, 3, 64, 8), (2, 2, 96, 4), (4, 1, 48, 2), (3, 1, 40, 1), (8, 2, 24, 1)]
)
def test_all_ranks_have_the_sum_and_its_norm(
    ranks: int, rows: int, columns: int, parts: int, dtype: torch.dtype
) -> None:
    """Any number of ranks, parts and columns, even and odd exchanges; the same bits on all ranks."""
    assert launch_norm.parts_of(rows, columns) == parts
    xs, residual, weight = inputs(ranks, rows, columns, dtype)
    wanted = expected(xs, residual, weight)
    for exchange in (4, 7):
        found = reduce_all(xs, residual, weight, exchange)
        assert error(found[0], wanted) < TOLERANCES[dtype]
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    twin = expected([*xs[:-1], xs[-1].roll(1)], residual, weight)
    assert not error(found[0], twin) < TOLERANCES[dtype]


@one_process
def test_a_unit_waits_for_the_squares_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first finds some of them, and reads again; one part more than there is would never come."""
    (x,), residual, weight = inputs(1, 1, 64, torch.float32)
    wanted = expected([x], residual, weight)
    left = (1 << 32) + (x + residual).view(8, 8).square().sum(1).view(torch.int32)
    boxes = Boxes(1)
    (box,), (lines,), (squares,) = boxes.boxes, boxes.lines, boxes.squares
    lines[:, :8], squares[:, :8] = BEHIND, 0
    squares[0, 3] = left[3]
    intact, found = norm._squares_left, []

    def late(*arguments: object) -> object:
        found.append(int((squares[0, :8] != 0).sum()))
        if len(found) == 2:
            squares[:8, :8] = left
        return intact(*arguments)

    monkeypatch.setattr(norm, "_squares_left", late)
    assert error(launch_norm.reduce_add_norm(x, residual, weight, box, EPSILON, 0, 1), wanted) < TOLERANCES[x.dtype]
    assert found[:2] == [2, 2], "its own and that of the fourth part"
    assert len(found) == 9, "the others find all at once"
    assert not squares[7].any(), "the last has cleared its line, and nobody came behind it"
    squares[:, :8] = ONE
    twin = launch_norm.reduce_add_norm(x, residual, weight, box, EPSILON, 0, 1)
    assert not error(twin, wanted) < TOLERANCES[x.dtype]


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


def test_parts_of_a_row() -> None:
    """No more units than a mailbox has lines, each a multiple of 8 columns."""
    rows = (1, 16, 17, 32, 33, 64, 65, 128)
    assert [launch_norm.parts_of(count, 4096) for count in rows] == [8, 8, 4, 4, 2, 2, 1, 1]
    assert [launch_norm.parts_of(1, columns) for columns in (64, 96, 48, 40, 36)] == [8, 4, 2, 1, 1]


def tiles(block: int, width: int, *sites: int, before: int = 0) -> tuple[int, ...]:
    """(rows of A held, warps), and of the product ahead, of so many columns, (rows, columns of A)."""
    nothing = torch.empty(0)
    ahead = launch_norm.Before(torch.empty(1, before), 0, width) if before else None
    found = launch_norm._tiles(
        block, launch_norm.Lora(Factors(nothing, nothing, nothing, sites), width, nothing, ahead)
    )
    return tuple(found[name] for name in ("ROWS", "num_warps", *(("ROWS_BEFORE", "BLOCK_K") if before else ())))


def test_tiles() -> None:
    """Up to 64 elements a thread; more warps where more rows are wanted or parts are wide."""
    assert [tiles(512, width, 0) for width in (2, 6, 24, 48)] == [(2, 4), (8, 4), (32, 8), (32, 8)]
    assert [tiles(block, 8, 0, 1, 2) for block in (1024, 2048, 4096, 16384)] == [(16, 8), (16, 16), (8, 16), (2, 16)]
    assert tiles(512, 16, 0, 1, before=2048) == (32, 16, 16, 512)
    assert tiles(2048, 16, 0, 1, before=2048) == (8, 16, 16, 512)
    assert tiles(512, 64, before=512) == (1, 4, 16, 128)


# --- with LoRA ------------------------------------------------------------------------------------------------------

SLOT_RANKS = ((2, 4, 0), (8, 2, 12), (4, 24, 8))
WIDTH = 32
ROWS = 4


class Lora:
    """Sums and factors: tokens of three adapters and of none; sites in another order than the table's.

    ``before``: x lacks the LoRA of site 2, whose B has ``b_blocks``.
    """

    def __init__(
        self,
        ranks: int,
        columns: int,
        blocks: int,
        sites: list[int],
        dtype: torch.dtype,
        *,
        before: bool = False,
        b_blocks: int = 1,
    ) -> None:
        case = Case(SLOT_RANKS, columns, (32, 32, columns), blocks, b_blocks, ROWS, 3, dtype, False)
        bank, self.dense = bank_of(case)
        self.scales = bank.scales
        self.token_slot = torch.tensor([1, -1, 2, 0], dtype=torch.int32, device=DEVICE)
        self.factors = Factors(bank.pool, bank.slots, self.token_slot, sites)
        self.xs, self.residual, self.weight = inputs(ranks, ROWS, columns, dtype)
        u = self.residual.flip(0)
        self.before = launch_norm.Before(u, 2, WIDTH) if before else None

    def summands(self, token_slot: Tensor) -> list[Tensor]:
        """What is summed over the ranks, in float64: each rank's x and its LoRA, here the same on all."""
        added = torch.zeros(self.residual.shape, dtype=torch.float64)
        for token, slot in enumerate(token_slot.tolist()):
            if self.before is not None and (slot, 2) in self.dense:
                added[token] = self.dense[slot, 2] @ self.before.u[token].double().cpu()
        return [x.double() + added.to(DEVICE) for x in self.xs]

    def run(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What all ranks get."""
        count, results = len(self.xs), []
        for rank, box in Boxes(count).ready():
            values = (self.xs[rank], self.residual, self.weight, box, EPSILON, rank, count)
            lora = launch_norm.Lora(self.factors, WIDTH, self.scales, self.before)
            results.append(launch_norm.reduce_add_norm_lora(*values, lora))
        return results[-count:]

    def is_written(self) -> Tensor:
        """[T, n, WIDTH]: below the rank of a token's slot."""
        ranks = self.factors.slots[:, :, SlotField.A_RANK][self.factors.sites][:, self.token_slot.clamp(min=0).long()]
        ranks = torch.where(self.token_slot >= 0, ranks, 0)
        return torch.arange(WIDTH, device=DEVICE) < ranks.t()[:, :, None]

    def h_of(self, total: Tensor, token_slot: Tensor) -> Tensor:
        """In float64 from the sum that was found, [T, n, WIDTH]."""
        pool, slots, _, sites = self.factors
        normed = norm_of(total, self.weight)
        if not sites:
            return normed.new_zeros(ROWS, 0, WIDTH)
        return plain(lora_shrink)(normed, pool.double(), slots, token_slot, sites, WIDTH).view(ROWS, len(sites), WIDTH)

    def error(self, total: Tensor, h: Tensor, token_slot: Tensor) -> float:
        """Of what is written, relative to the largest."""
        wanted = self.h_of(total, token_slot)
        found = torch.where(self.is_written(), h.double().sum(0), 0)
        return float((found - wanted).abs().max() / wanted.abs().max())

    def check(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Sum, norm and h; nothing else is written, and another token's slot would be noticed."""
        results = self.run()
        total, normed, h = results[0]
        tolerance, (wanted, twin) = (
            TOLERANCES[total.dtype],
            (
                expected(self.summands(slots), self.residual, self.weight)
                for slots in (self.token_slot, self.token_slot.roll(1))
            ),
        )
        assert error((total, normed), wanted) < tolerance
        assert self.before is None or not error((total, normed), twin) < 4 * tolerance
        assert h.shape == (8, ROWS, len(self.factors.sites), WIDTH)
        if not self.factors.sites:
            return results
        assert torch.equal(~h.isnan(), self.is_written().expand(h.shape))
        assert self.error(total, h, self.token_slot) < H_TOLERANCE
        assert not self.error(total, h, self.token_slot.roll(1)) < H_TOLERANCE
        return results


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """What nobody writes is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize(
    ("columns", "blocks", "elements"),
    [
        *((columns, 1, 2048) for columns in (64, 96, 48, 40, 36)),
        *((columns, 4, 2048) for columns in (96, 64, 36)),
        *((columns, blocks, 16) for columns, blocks in ((64, 1), (48, 2), (40, 4))),
    ],
)
def test_h_of_the_norm(columns: int, blocks: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """8, 4, 2 parts of a row and one; packed A, in several parts; no multiples of 8; several turns of A's rows."""
    monkeypatch.setattr(launch_norm, "_ELEMENTS_HELD", elements)
    Lora(1, columns, blocks, [2, 0, 1], torch.bfloat16).check()


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize(
    ("columns", "blocks", "b_blocks", "elements", "sites"),
    [
        (64, 1, 1, 2048, [0, 1]),
        (64, 4, 1, 2048, [1]),
        (96, 2, 1, 32, [0, 1]),
        (64, 1, 1, 16, []),
        (40, 2, 1, 2048, [0]),
        (36, 1, 1, 2048, [0]),
        (64, 1, 4, 2048, [0]),
    ],
    ids=["8 parts", "packed", "several turns", "no h", "odd blocks", "odd columns", "packed B"],
)
def test_lora_of_the_product_ahead(
    columns: int, blocks: int, b_blocks: int, elements: int, sites: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is added to x before the sum; h of the paths behind is that of the result."""
    monkeypatch.setattr(launch_norm, "_ELEMENTS_HELD", elements)
    Lora(1, columns, blocks, sites, torch.bfloat16, before=True, b_blocks=b_blocks).check()


@one_process
@pytest.mark.usefixtures("empty_is_nan")
def test_lora_of_all_ranks_products() -> None:
    """Each rank adds its own to its own."""
    Lora(2, 64, 2, [0], torch.bfloat16, before=True).check()


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize("sites", [[1], [2, 1]])
def test_h_of_fewer_sites(sites: list[int]) -> None:
    """Of one and of two."""
    Lora(1, 64, 1, sites, torch.float16).check()


@one_process
@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize("columns", [64, 40])
def test_all_ranks_have_one_h(columns: int) -> None:
    """The norm's bits are the same, and so are those of h where the factors are."""
    results = Lora(2, columns, 1, [0], torch.bfloat16).check()
    first, *others = (torch.cat([value.nan_to_num().double().flatten() for value in triple]) for triple in results)
    assert all(torch.equal(first, other) for other in others)


def test_h_of_a_norm_that_is_there() -> None:
    """By a shrink, all in one plane."""
    lora = Lora(1, 64, 1, [2, 0, 1], torch.bfloat16)
    total = (lora.xs[0] + lora.residual).double()
    normed = norm_of(total, lora.weight).to(torch.bfloat16)
    h = launch_norm.h_of(normed, lora.factors, WIDTH)
    assert h.shape == (8, ROWS, 3, WIDTH)
    assert not h[1:].any()
    # Here the norm is rounded before the product.
    assert lora.error(total, h, lora.token_slot) < TOLERANCES[torch.bfloat16]
    assert not lora.error(total, h, lora.token_slot.roll(1)) < TOLERANCES[torch.bfloat16]


class Alone:
    """A process group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize("is_deferred", [False, True], ids=["", "with the LoRA ahead"])
@pytest.mark.parametrize(
    ("rows", "limit", "dtype", "has_h"),
    [
        (ROWS, 1 << 20, torch.bfloat16, True),
        (ROWS, 0, torch.bfloat16, True),
        (ROWS, 1 << 20, torch.float32, True),
        (70, 1 << 20, torch.bfloat16, False),
    ],
    ids=["exchanged", "apart", "float32", "many tokens"],
)
def test_the_operator(
    rows: int, limit: int, dtype: torch.dtype, has_h: bool, is_deferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on GPUs, against the plain implementation; another norm would be noticed in h."""
    monkeypatch.setattr(norm_op, "group_named", lambda _: Alone())
    monkeypatch.setattr(norm_op, "all_reduce", lambda x, *_: x)
    lora = Lora(1, 64, 1, [2, 0, 1], dtype)
    (x,), residual, weight = inputs(1, rows, 64, dtype)
    x, residual = x.view(2, -1, 64), residual.view(2, -1, 64)
    pool, slots, _, sites = lora.factors
    token_slot = (torch.arange(rows, device=DEVICE) % 3).to(torch.int32)

    def call(run: Any, summand: Tensor, mailbox: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        values = [value.to(device) for value in (summand, residual, weight, mailbox, mailbox)]
        factors = [value.to(device) for value in (pool, slots, lora.scales, token_slot)]
        ahead = (residual.flip(-1).to(device), 2, WIDTH) if is_deferred else (None, 0, 0)
        total, normed, h = run(*values, EPSILON, limit, limit, "group", *factors, sites, WIDTH, *ahead)
        return total.cpu(), normed.cpu(), h.cpu()

    boxes = Boxes(1)
    for _, box in boxes.ready():
        found = call(on_gpu(all_reduce_add_norm_lora), x, box, DEVICE)
    wanted = call(plain(all_reduce_add_norm_lora), x, box, torch.device("cpu"))
    assert error(found[:2], wanted[:2]) < TOLERANCES[dtype]
    units = rows * launch_norm.parts_of(rows, 64) if limit else 0
    boxes.check_told(units)
    assert found[2].shape == wanted[2].shape == (norm_op.PLANES, rows, 3, WIDTH)
    assert found[2].dtype is torch.float32
    if has_h:
        other = call(plain(all_reduce_add_norm_lora), x.roll(1), box, torch.device("cpu"))
        is_written = wanted[2][0] != 0
        found_h, wanted_h, other_h = (torch.where(is_written, h.sum(0), 0) for h in (found[2], wanted[2], other[2]))
        assert error((found_h, found_h), (wanted_h, wanted_h)) < TOLERANCES[dtype]
        assert not error((found_h, found_h), (other_h, other_h)) < TOLERANCES[dtype]


def test_fake_and_kernels_agree_on_planes() -> None:
    """The operator states the number by itself; shapes are known without running it."""
    assert norm_op.PLANES == launch_norm.PLANES
    x = torch.empty(2, 3, 64, dtype=torch.bfloat16, device="meta")
    nothing = torch.empty(1, dtype=torch.int64, device="meta")
    bank = (x, nothing, nothing, nothing)
    values = (x, x, x[0, 0], nothing, nothing, EPSILON, 0, 0, "group", *bank, [0, 4], 16, None, 0, 0)
    total, normed, h = all_reduce_add_norm_lora(*values)
    assert total.shape == normed.shape == x.shape
    assert h.shape == (8, 6, 2, 16)
    assert h.dtype is torch.float32
