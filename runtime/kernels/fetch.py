"""Bringing the first bytes of each row of a matrix into the L2 cache, by programs beside those of another kernel.

With few tokens a product takes as long as the bytes of its weight. While ranks exchange sums, and while attention waits
for latencies, memory has little to do: programs of a kernel ahead ask for the weight of the product to come. They wait
for nothing, nobody waits for them, and results do not depend on them. (PRESERVE, arXiv 2501.08192, fetches weights
while collectives run.)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from bdlora_compile.runtime.kernels.tiles import can_overlap

MOST_TOKENS = 128
"""Of a product whose weight is worth fetching: with more it takes longer than its weight's bytes."""

PIECE: tl.constexpr = tl.constexpr(512)
"""Bytes that a thread asks for."""


@triton.jit
def piece_offset(piece, PIECES: tl.constexpr, PIECES_A_ROW: tl.constexpr, ROW_BYTES: tl.constexpr):
    """Where pieces begin, in bytes behind the matrix; the last one stands for those behind it."""
    known = tl.minimum(piece, PIECES - 1)
    return (known // PIECES_A_ROW).to(tl.int64) * ROW_BYTES + known % PIECES_A_ROW * PIECE


@triton.jit
def fetch_pieces(
    matrix, program, PIECES: tl.constexpr, PIECES_A_ROW: tl.constexpr, ROW_BYTES: tl.constexpr, THREADS: tl.constexpr
):
    """Ask for the pieces of one of the programs that fetch, one for each thread.

    ``matrix`` begins at a multiple of 16 bytes, as do its rows, ROW_BYTES apart.
    """
    piece = program * THREADS + tl.arange(0, THREADS)
    address = matrix.to(tl.int64) + piece_offset(piece, PIECES, PIECES_A_ROW, ROW_BYTES)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 512; mov.u32 $0, 0;", "=r,l", [address],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fetch:
    """What a launch fetches by the way.

    Attributes:
        matrix: [rows, columns]; any tensor if there are no pieces.
        pieces, pieces_a_row: of all rows, and of each.
    """

    matrix: Tensor
    pieces: int = 0
    pieces_a_row: int = 1

    def programs(self, warps: int) -> int:
        """Programs that fetch, beside the others of a launch."""
        return triton.cdiv(self.pieces, 32 * warps)

    def constants(self) -> Mapping[str, int]:
        """The constants that a kernel takes."""
        row_bytes = self.matrix.stride(0) * self.matrix.element_size() if self.pieces else 0
        return {"PIECES": self.pieces, "PIECES_A_ROW": self.pieces_a_row, "ROW_BYTES": row_bytes}


def fetch_of(matrix: Tensor | None, limit: int) -> Fetch | None:
    """As many whole pieces at the beginning of each row as ``limit`` bytes allow for all rows together; None if none.

    Args:
        matrix: [rows, columns], None for nothing.
        limit: bytes.
    """
    if matrix is None or not can_overlap() or matrix.stride(1) != 1:
        return None
    row_bytes = matrix.shape[1] * matrix.element_size()
    pieces = min(row_bytes, limit // matrix.shape[0]) // PIECE.value
    is_aligned = (matrix.data_ptr() | (matrix.stride(0) * matrix.element_size())) % 16 == 0
    return Fetch(matrix, matrix.shape[0] * pieces, pieces) if pieces and is_aligned else None
