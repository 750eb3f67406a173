"""What is fetched ahead: whole pieces at the beginning of each row, nothing outside of the matrix."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bdlora_compile.runtime.kernels import fetch
from bdlora_compile.runtime.kernels.fetch import PIECE, Fetch, fetch_of, piece_offset
from tests.kernels.test_kernels import DEVICE

WARPS = 4


@triton.jit
def offsets_of_all(  # type: ignore[no-untyped-def]  # a kernel
    out, PIECES: tl.constexpr, PIECES_A_ROW: tl.constexpr, ROW_BYTES: tl.constexpr, THREADS: tl.constexpr
):
    """Where each thread's piece begins."""
    piece = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    tl.store(out + piece, piece_offset(piece, PIECES, PIECES_A_ROW, ROW_BYTES))


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "can_overlap", lambda: True)


def matrix(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("rows", "columns", "limit", "pieces"),
    [(5, 512, 5 * 1024, 2), (5, 512, 1 << 20, 2), (300, 768, 300 * 1500, 2), (7, 304, 7 * 608, 1)],
    ids=["all of it", "no more than there is", "a part of each row", "no part of a piece"],
)
def test_each_row_s_first_pieces_are_asked_for(rows: int, columns: int, limit: int, pieces: int) -> None:
    """Once each, but for the last one, which stands for the threads that have none."""
    wanted = fetch_of(matrix(rows, columns), limit)
    assert wanted is not None
    threads = 32 * WARPS
    out = torch.full((wanted.programs(WARPS) * threads,), -1, dtype=torch.int64, device=DEVICE)
    offsets_of_all[(wanted.programs(WARPS),)](out, **wanted.constants(), THREADS=threads)
    expected = [row * columns * 2 + piece * PIECE.value for row in range(rows) for piece in range(pieces)]
    assert out[: len(expected)].tolist() == expected
    assert set(out[len(expected) :].tolist()) <= {expected[-1]}
    assert max(out.tolist()) + PIECE.value <= rows * columns * 2


@pytest.mark.usefixtures("on_hopper")
def test_nothing_is_fetched_where_it_cannot_be() -> None:
    """No weight, no whole piece of a row, rows that begin between 16 bytes, columns that do not lie together."""
    whole = matrix(4, 512)
    assert fetch_of(whole, 4096) is not None
    assert fetch_of(None, 4096) is None
    assert fetch_of(whole, 4 * PIECE.value - 1) is None
    assert fetch_of(matrix(4, 516)[:, 1:], 4096) is None
    assert fetch_of(matrix(512, 512).t(), 1 << 20) is None
    assert Fetch(whole).programs(WARPS) == 0


def test_nothing_is_fetched_without_a_gpu_that_can() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert fetch_of(matrix(4, 512), 4096) is None
