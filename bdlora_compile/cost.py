"""What the LoRA of a site costs one rank, and what its linear layer costs, as formulas in sympy.

Legend: D/O in/out features, R adapter rank, C largest rank that the bank admits, G blocks of a factor that is
block-diagonal along the dim that ranks split (1 for any other), N ranks, M pieces of the split dim (M = N at row
sites), i the piece that the rank holds, T tokens of the forward, K distinct adapters in it, a and b elements of A and B
on the rank, e bytes of an element, f bytes of an element of h = A x.

    layout  site    a                  b                        collective between the factors
    local   column  r D                r L / c                  none
    local   row     r L / c            r O                      none
    slora   column  ceil(R/N) D        ceil(R/N) N L            all-gather, result N ceil(C/N) T f bytes
    slora   row     R L                R ceil(O/N)              all-reduce, C T f bytes

    L = ceil(S/M): features of the split dim S on a rank (S = O at column sites, D at row sites); M divides S but at a
        vocabulary, whose last pieces are short
    r = (ceil(min((i+1) L, S) G/S) - floor(min(i L, S) G/S)) R/G: the blocks that the rank's piece overlaps; R if G = 1
    c = G L/S where that is a whole number and the piece is not short, else 1: the blocks that stay packed

Sites that read one x (q/k/v; gate/up) are one group: x is read once, there is one launch of each kernel and one
collective, whose bytes are the sum of the sites'. Kernels are those of `runtime/ops.py`; each of its elementwise
helpers (copy of y, sum of planes, order of what a gather brought) is a kernel more, with its bytes.

Beside the sites: attention over a cache (h heads and h_kv kv heads of size d on the rank, contexts of L tokens), the
embedding and the logits (vocabulary V). Norms, activation functions, rotary angles and sampling are not counted.

`tests/numerics/test_cost.py` holds a and b against the bank and collectives against compiled graphs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy
from sympy import Expr, Integer, Rational, ceiling, floor

from bdlora_compile.factors import Layout
from bdlora_compile.machine import CollectiveKind
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.sites import Role


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


T, D, O, R, C, G, N, M, K = map(_symbol, "TDORCGNMK")  # noqa: E741 (the legend's letter)
E, F = _symbol("e"), _symbol("f")
A = sympy.Symbol("a", nonnegative=True)
B = sympy.Symbol("b", nonnegative=True)
PIECE = sympy.Symbol("i", integer=True, nonnegative=True)


def split(role: Role) -> sympy.Symbol:
    """S, the features of the dim that ranks split."""
    return O if role is Role.COLUMN else D


def length(role: Role) -> Expr:
    """L, how many of them a rank holds."""
    return ceiling(split(role) / M)


def local_rank(role: Role) -> Expr:
    """r of a local layout, on the rank that holds piece i."""
    features, own = split(role), length(role)
    start, stop = sympy.Min(PIECE * own, features), sympy.Min((PIECE + 1) * own, features)
    overlapped = ceiling(stop * G / features) - floor(start * G / features)
    return sympy.Piecewise((R, sympy.Eq(G, 1)), (overlapped * R / G, True))


def packed_blocks(role: Role) -> Expr:
    """c of a local layout, on the rank that holds piece i."""
    features, own = split(role), length(role)
    is_whole = sympy.Eq(sympy.Mod(G * own, features), 0) & ((PIECE + 1) * own <= features)
    return sympy.Piecewise((G * own / features, is_whole), (Integer(1), True))


@dataclass(frozen=True, slots=True)
class Exchange:
    """A collective.

    Attributes:
        kind: name of the operator.
        payload: bytes, as `census.py` counts them.
        is_sum: whether it may go through symmetric memory: an all-reduce, or a gather that becomes one of the same
            payload there (`transport.py`).
    """

    kind: CollectiveKind
    payload: Expr
    is_sum: bool = True


@dataclass(frozen=True, slots=True)
class Elements:
    """Elements of A and B of one adapter on one rank, in R, G, N, M, D, O and i."""

    a: Expr
    b: Expr


@dataclass(frozen=True, slots=True)
class Formula:
    """What one site adds to a forward on one rank.

    Attributes:
        x_reads: bytes of x, read once for all the sites of a group.
        reads: other bytes read.
        writes: bytes written.
        flops: multiplications and additions.
        launches: kernels, the same for a group as for a site of it.
        exchange: the collective, one for a group with the sites' bytes together; None where there is none.
    """

    x_reads: Expr
    reads: Expr
    writes: Expr
    flops: Expr
    launches: Expr
    exchange: Exchange | None = None


@cache
def elements(role: Role, layout: Layout) -> Elements:
    """Elements of both factors."""
    if layout is Layout.SLORA:
        share = ceiling(R / N)
        if role is Role.COLUMN:
            return Elements(share * D, share * N * length(role))
        return Elements(R * length(role), R * ceiling(O / N))
    rank, own = local_rank(role), length(role) / packed_blocks(role)
    return Elements(rank * D, rank * own) if role is Role.COLUMN else Elements(rank * own, rank * O)


@cache
def lora(role: Role, layout: Layout) -> Formula:
    """The LoRA path of one site; ``a`` and ``b`` are those of `elements`, or a mean of several adapters'."""
    factors = K * E * (A + B)
    flops = 2 * T * (A + B)
    x = E * T * (D if role is Role.COLUMN else length(role))
    if layout is Layout.LOCAL:
        y = E * T * (length(role) if role is Role.COLUMN else O)
        # On GPUs it is a kernel more with few tokens, but beside the product; a shrink and an expand with more tokens.
        return Formula(x, factors + y, y, flops, _launches(1, 2))
    if role is Role.COLUMN:
        share, gathered = F * T * ceiling(C / N), F * T * ceiling(C / N) * N
        y = E * T * length(role)
        reads = factors + share + gathered + y + gathered + y
        writes = share + share + gathered + y + y
        # Shrink, sum of its planes, order of what the gather brought, copy of y, expand.
        return Formula(x, reads, writes, flops, _launches(2, 5), Exchange("all_gather_into_tensor", gathered))
    h, copy, own = F * T * C, E * T * O, E * T * ceiling(O / N)
    # The same without an order to restore.
    exchange = Exchange("all_reduce", h)
    return Formula(x, factors + 2 * h + copy + own, 2 * h + copy + own, flops, _launches(2, 4), exchange)


def _launches(few: int, many: int) -> Expr:
    """Kernels of a LoRA path with few tokens, where it lies beside its product, and with many."""
    return sympy.Piecewise((Integer(few), T <= BY_TOKEN_LIMIT), (Integer(many), True))


@cache
def lookup(layout: Layout) -> Formula:
    """The LoRA path of an embedding: a row site whose x are token ids, each of which reads one column of A."""
    full = lora(Role.ROW, layout)
    unread = K * E * A - E * T * A / length(Role.ROW)
    return Formula(8 * T, full.reads - unread, full.writes, full.flops - 2 * T * A, full.launches + 1, full.exchange)


@cache
def base(role: Role) -> Formula:
    """The linear layer of one site."""
    if role is Role.COLUMN:
        weight, x, y = D * length(role), E * T * D, E * T * length(role)
        return Formula(x, E * weight, y, 2 * T * weight, Integer(1))
    weight, x, y = O * length(role), E * T * length(role), E * T * O
    return Formula(x, E * weight, y, 2 * T * weight, Integer(1), Exchange("all_reduce", y))


H_KV, HEADS, HEAD_DIM, CONTEXT, ROWS, V = map(_symbol, ("h_kv", "h", "d", "L", "rows", "V"))


@cache
def attention() -> Formula:
    """One layer's attention: keys and values of ``rows`` contexts of L tokens read once, h heads of d on this rank."""
    cached = 2 * E * ROWS * CONTEXT * H_KV * HEAD_DIM
    x = E * T * HEADS * HEAD_DIM
    return Formula(x, cached, x, 4 * T * CONTEXT * HEADS * HEAD_DIM, Integer(1))


@cache
def embedding() -> Formula:
    """The embedding, cut on the vocabulary: D features a token, then one all-reduce."""
    y = E * T * D
    return Formula(y, Integer(0), y, Integer(0), Integer(1), Exchange("all_reduce", y))


@cache
def logits() -> Formula:
    """The output layer for one token of each row, cut on the vocabulary V, then one all-gather."""
    own = ceiling(V / N)
    y = E * ROWS * own
    return Formula(
        E * ROWS * D, E * own * D, y, 2 * ROWS * own * D, Integer(1),
        Exchange("all_gather_into_tensor", y * N, is_sum=False),
    )  # fmt: skip


def value_of(formula: Expr, numbers: Mapping[sympy.Symbol, int | Rational]) -> Rational:
    """A formula in numbers, exactly.

    Raises:
        AssertionError: a symbol of the formula has no number.
    """
    found: Any = formula.xreplace({symbol: sympy.sympify(number) for symbol, number in numbers.items()})
    assert found.is_number, f"{formula}: no number for {found.free_symbols}"
    return found
