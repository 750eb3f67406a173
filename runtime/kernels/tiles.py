"""Which kernels serve a call, and their tile sizes: a table made by `benchmarks/tune.py`, and what to do off the table.

Nothing is measured when the package is imported or used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

from bdlora_compile.runtime.kernels.tuned import TUNED, Key

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Call:
    """What the choice depends on: sizes that are fixed when a graph is captured, never the mix of adapters.

    Attributes:
        tokens: T.
        in_features: columns of x.
        out_features: columns that B writes, for each site of the call.
        width: no slot has a larger local rank.
    """

    tokens: int
    in_features: int
    out_features: tuple[int, ...]
    width: int


@dataclass(frozen=True, slots=True)
class OneLaunch:
    """`apply_tokens`.

    Attributes:
        rows: of both factors that a program holds at once, a power of two; a larger rank takes several turns.
        warps: of a program, which owns 256 columns of y for each: 16 bytes a thread.
        overlap: start before the base product has ended. That pays behind a product that ends in a small kernel of its
            own; behind others the launch takes longer.
        registers: of a thread, at most, so that more programs fit a multiprocessor; 0 is what the compiler takes.
    """

    rows: int
    warps: int
    overlap: bool = True
    registers: int = 0

    @property
    def columns(self) -> int:
        """Columns of y that a program owns."""
        return ELEMENTS_OF_A_WARP * self.warps


@dataclass(frozen=True, slots=True)
class Shrink:
    """`shrink_tokens`, `shrink_segments` and `shrink_mixed`.

    Attributes:
        rows, depth: rows and columns of A that a program holds at once.
        warps: of a program.
        splits: by segment only: planes of h, each a share of A's columns. Else a plane is ``depth`` columns.
        stages: tiles under way, where tokens share a slot.
    """

    rows: int
    depth: int
    warps: int
    splits: int = 1
    stages: int = 1


@dataclass(frozen=True, slots=True)
class Expand:
    """`expand_tokens` and `expand_segments`.

    Attributes:
        rows, columns: rows of B and columns of y that a program holds at once.
        warps: of a program.
        repeat: by segment only: tiles of columns that a program does one after the other.
        registers: by token only: as for `OneLaunch`.
    """

    rows: int
    columns: int
    warps: int
    repeat: int = 1
    registers: int = 0


@dataclass(frozen=True, slots=True)
class TwoLaunches:
    """A shrink and an expand.

    Attributes:
        overlap: as for `OneLaunch`, for the shrink (the expand always overlaps it).
        by_token: work token by token also where tokens are grouped.
    """

    shrink: Shrink
    expand: Expand
    overlap: bool = True
    by_token: bool = False


Plan = OneLaunch | TwoLaunches

BY_TOKEN_LIMIT = 64
"""Tokens up to which a launch behind a product works token by token; above it by segments of tokens that share a slot.

LoRA of so many, which the project calls few, may lie beside its product."""

ALONE_LIMIT = 16
"""Tokens up to which none are grouped by slot: there is little that they could share."""

SEGMENT_FIELDS = 6
"""Numbers in a row of segments, see `launch.segment_work`."""

SHARES = 4
"""Parts of a tile of delta, one for each program, where tokens that share a slot have theirs computed together."""

TOGETHER = 8
"""Tokens that share a slot from which on that is so, on the tensor cores. Sixteen of a slot were faster so, four of a
block-diagonal adapter slower; what lies between was not measured."""

TOGETHER_BEHIND_EXCHANGE = 4
"""The same behind an exchange between ranks, where four of a slot were faster so."""

ELEMENTS_OF_A_WARP = 256
"""Of bf16, 16 bytes for each thread."""

_LIKE = {"NVIDIA H100 80GB HBM3": "NVIDIA H200"}
"""GPUs that take another's plans where they have none of their own: the same multiprocessors, and plans chosen behind
kernels as a layer has them."""

BUCKETS = (16, 64, 256, 2048)
"""Numbers of tokens in the table; a call takes the next larger one, or the last."""

NARROW = 8
"""Largest local rank that one launch serves: every program reads all of A."""

_MOST_OF_A = 65536
"""Elements of A that a program of 8 warps can hold: 256 a thread."""


_SHORT = 256
"""Rows of factors, of all tokens together, that are few enough that the time of a launch counts, not of its bytes."""


def shrink_beside(tokens: int, in_features: int, width: int) -> Shrink:
    """The launch of h beside a product without LoRA; ``width``: of h.

    Little work is done by few programs, of 128 elements of A a thread: the product beside them is then slowed least.
    More work takes less time with 64. Where tokens are grouped, programs have rows for the tensor cores.
    """
    columns = _power_of_two(in_features)
    if tokens > ALONE_LIMIT:
        rows = min(width, 16)
        # No more than 16 planes, which readers sum.
        depth = min(columns, 4096, max(16384 // rows, columns // 16))
        return Shrink(rows, depth, max(2, rows * depth // 4096), stages=4)
    is_short = tokens * width <= _SHORT
    rows, depth = min(width, 8 if is_short else 4), min(columns, 4096)
    return Shrink(rows, depth, max(2, rows * depth // (4096 if is_short else 2048)))


def delta_tiles(width: int) -> Expand:
    """A program of `delta_tokens` and `delta_mixed`; ``width``: of h, all parts together.

    A thread has 8 columns of y, 16 bytes, and all rows of B at them: no sums across threads, which took longer than
    the rest of the kernel.
    """
    warps = 4
    return Expand(min(max(2, _power_of_two(width)), 16), ELEMENTS_OF_A_WARP * warps, warps)


def segment_tokens(tokens: int) -> int:
    """Tokens of a segment at most; 0 where tokens are not grouped."""
    if tokens <= ALONE_LIMIT:
        return 0
    return 16 if tokens <= 256 else 64


def plan_for(call: Call) -> Plan:
    """The table's plan for this GPU and shape, or the default."""
    return _table().get(_key(call)) or default_plan(call)


def bucket_of(tokens: int) -> int:
    """The table's number of tokens for a call."""
    return next((bucket for bucket in BUCKETS if tokens <= bucket), BUCKETS[-1])


def _key(call: Call) -> Key:
    return bucket_of(call.tokens), call.in_features, call.out_features, _power_of_two(call.width)


@cache
def _table() -> dict[Key, Plan]:
    if not torch.cuda.is_available():
        return {}
    return {key: _plan(*fields) for key, fields in _rows_of(TUNED).items()}


def _rows_of(table: Mapping[str, Mapping[Key, Row]]) -> dict[Key, Row]:
    """The rows of one that is like this GPU, and of this GPU, which count."""
    name = torch.cuda.get_device_name()
    return {**table.get(_LIKE.get(name, name), {}), **table.get(name, {})}


def _plan(first: int | tuple[int, ...], second: int | tuple[int, ...], *rest: int) -> Plan:
    """Of a table's fields: those that are not as by default come last."""
    if isinstance(first, int):
        assert isinstance(second, int)
        return OneLaunch(first, second, *rest)  # type: ignore[arg-type]  # a flag is a number here
    assert isinstance(second, tuple)
    return TwoLaunches(Shrink(*first), Expand(*second), *rest)  # type: ignore[arg-type]  # as above


def default_plan(call: Call) -> Plan:
    """What is good where nothing was measured."""
    rows = max(2, _power_of_two(call.width))
    fits = rows <= NARROW and rows * _power_of_two(call.in_features) <= _MOST_OF_A
    if call.tokens <= BY_TOKEN_LIMIT and fits:
        # 16 columns of A a thread for each row; a product with a long sum ends in a small kernel that adds its parts.
        warps = min(8, max(2, _power_of_two(call.in_features // 256)))
        has_long_sum = call.in_features >= 2 * sum(call.out_features)
        return OneLaunch(rows, warps, overlap=has_long_sum)
    if call.tokens <= 256 and fits and rows <= 4:
        # A segment's tile is 16 tokens and 16 rows, of which so narrow a rank uses little.
        warps = 2 if call.in_features <= 512 else max(2 * rows, rows * _power_of_two(call.in_features) // 8192)
        return OneLaunch(rows, warps, overlap=False)
    if BY_TOKEN_LIMIT < call.tokens <= 128 and rows == 16:
        return TwoLaunches(Shrink(8, 2048, 8), Expand(16, 1024, 4), by_token=True)
    return default_launches(call)


def default_launches(call: Call) -> TwoLaunches:
    """The same where a collective lies between the factors."""
    width = _power_of_two(call.width)
    if call.tokens <= BY_TOKEN_LIMIT:
        rows = min(max(width, 2), 64)
        columns = max(128, min(1024, 16384 // rows))
        return TwoLaunches(Shrink(min(rows, 8), 2048, 8), Expand(rows, columns, 4))
    if call.tokens <= 256:
        rows = 32 if width > 16 else 16
        expand = Expand(64 if width > 32 else 32, 128, 4) if width > 16 else Expand(16, 128, 2, repeat=2)
        return TwoLaunches(Shrink(rows, 256, 4, splits=_splits(call, 4), stages=3), expand)
    rows = 64 if width > 16 else 32
    shrink = Shrink(rows, 64 if rows == 64 else 128, 4, splits=_splits(call, 2 if rows == 64 else 4), stages=4)
    return TwoLaunches(shrink, Expand(min(max(width, 16), 64), 128, 4, repeat=4))


def h_width(width: int) -> int:
    """Columns of h for a site, beside a product: a power of two."""
    return max(2, _power_of_two(width))


def rotary_heads(heads: int, kv_heads: int, dim: int) -> int:
    """Heads that a program of `rotate_tokens` has: 256 columns."""
    return min(max(1, 128 // _power_of_two(dim // 2)), _power_of_two(max(heads, kv_heads)))


def one_plane_shrink(in_features: int, width: int) -> Shrink:
    """A shrink by token whose programs see all columns of A: a collective then reads h as it is, without a sum."""
    depth = _power_of_two(in_features)
    return Shrink(max(1, min(_power_of_two(width), 16384 // depth)), depth, 8)


def _splits(call: Call, most: int) -> int:
    """Planes of h: none where A has few columns."""
    return max(1, min(most, call.in_features // 512))


def _power_of_two(number: int) -> int:
    return 1 << (max(number, 1) - 1).bit_length()


@cache
def can_overlap() -> bool:
    """Programmatic dependent launch exists from Hopper on, and not in the interpreter."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
