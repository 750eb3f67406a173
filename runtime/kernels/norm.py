"""All-reduce, residual addition and RMSNorm of a row in one program, with what LoRA adds to the product ahead
(`delta.py`); and the same without the all-reduce.

Every rank has a *mailbox* in symmetric memory, int64 words: the addresses of all ranks' mailboxes; for each row a line
of `_LINE` words, in which each peer leaves the number of the exchange that its row is ready for, and the rank itself
how many exchanges the row has had; then for each row two places for its values.

Program r of every rank exchanges with program r of the others, and with nobody else. In exchange e of its row it writes
its values into place e mod 2, tells the peers (release), waits until all have told it (acquire), and reads theirs. It
writes to that place again in exchange e + 2. By then every peer has told it of e + 1, and so has ended exchange e, as a
rank's kernels run one after the other. So one wait an exchange does. Numbers are kept on the device: a CUDA graph may
be replayed. They have 64 bits and do not come round.

What must hold: all ranks launch the same calls in the same order, each on one stream; and all programs of a launch fit
on the device at once, or those that wait could keep out those that others wait for.
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.fields import let_next_kernel_start, rounded_sum, wait_for_kernel_ahead

MAX_RANKS: tl.constexpr = tl.constexpr(8)
MAX_ROWS: tl.constexpr = tl.constexpr(128)
"""Rows of one call."""
PLACE_BYTES: tl.constexpr = tl.constexpr(32768)
"""Bytes of a row's values, at most."""
_LINE: tl.constexpr = tl.constexpr(16)
"""Words of a line of the cache, 128 bytes: rows do not share one."""
_EXCHANGES: tl.constexpr = tl.constexpr(8)
"""Where in its line a row's own number stands; before it those of the ranks."""
_PLACES: tl.constexpr = tl.constexpr(16 + 128 * 16)
"""The first word behind the addresses (one line) and the rows' lines."""
MAILBOX_WORDS = _PLACES.value + MAX_ROWS.value * 2 * PLACE_BYTES.value // 8


@triton.jit
def _address_of(mailboxes, rank: tl.constexpr):
    """The address of a rank's mailbox, of those of all ranks [MAX_RANKS]."""
    return tl.sum(tl.where(tl.arange(0, MAX_RANKS) == rank, mailboxes, 0), axis=0)


@triton.jit
def _place(mailbox, row, exchange, values):
    """Where the values of a row lie in a mailbox, which is given by address; a pointer like ``values``."""
    address = mailbox + _PLACES * 8 + (row.to(tl.int64) * 2 + (exchange & 1)) * PLACE_BYTES
    return tl.multiple_of(address.to(values.dtype), 16)


@triton.jit
def _tell_peers(mailboxes, row, exchange, RANK: tl.constexpr, RANKS: tl.constexpr):
    """All that the program wrote before is there for who sees the number."""
    peers = tl.arange(0, MAX_RANKS)
    is_peer = (peers < RANKS) & (peers != RANK)
    lines = mailboxes + ((row + 1) * _LINE + RANK) * 8
    number = tl.zeros([MAX_RANKS], dtype=tl.int64) + (exchange + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lines.to(tl.pointer_type(tl.int64)), number, mask=is_peer, sem="release", scope="sys")


@triton.jit
def _told(line, exchange, RANK: tl.constexpr, RANKS: tl.constexpr):
    """The number that all peers have told, at least. Read by an atomic addition: it can acquire, loads cannot."""
    peers = tl.arange(0, MAX_RANKS)
    is_peer = (peers < RANKS) & (peers != RANK)
    nothing = tl.zeros([MAX_RANKS], dtype=tl.int64)
    numbers = tl.atomic_add(line + peers, nothing, mask=is_peer, sem="acquire", scope="sys")
    return tl.min(tl.where(is_peer, numbers, exchange + 1), axis=0)


@triton.jit
def _wait_for_peers(mailbox, row, exchange, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Until the peers' values of this exchange are there; for ever if one is lost (see `runtime/step_watch.py`)."""
    line = mailbox + (row + 1) * _LINE
    told = _told(line, exchange, RANK, RANKS)
    while told <= exchange:
        told = _told(line, exchange, RANK, RANKS)
    tl.debug_barrier()


@triton.jit
def _add_and_norm(reduced, before, scale, total, normed, inside, epsilon, COLUMNS: tl.constexpr):
    """Store residual + reduced and its norm; rounded where transformers' layers round. ``reduced`` is in float32."""
    kind = before.dtype
    summed = (reduced.to(kind).to(tl.float32) + before.to(tl.float32)).to(kind)
    tl.store(total, summed, mask=inside)
    exact = summed.to(tl.float32)
    variance = tl.sum(exact * exact, axis=0) / COLUMNS
    scaled = (exact * tl.rsqrt(variance + epsilon)).to(kind)
    tl.store(normed, (scale.to(tl.float32) * scaled.to(tl.float32)).to(kind), mask=inside)


@triton.jit
def all_reduce_add_norm_rows(
    x, residual, weight, mailbox, delta, total, normed, epsilon,
    RANK: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (rows). x, residual, total, normed: [rows, COLUMNS]; weight [COLUMNS]; mailbox: this rank's, int64.

    The sum over the ranks is taken in float32 in their order and rounded once, so all have the same bits.

    HAS_DELTA: delta, like x, is what this rank's x lacks.

    OVERLAP: weight and addresses are read before the kernel ahead in the stream has ended; the next one may start while
    this one waits for the peers.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    at = row.to(tl.int64) * COLUMNS + column
    scale = tl.load(weight + column, mask=inside, other=0.0)
    mailboxes = tl.load(mailbox + tl.arange(0, MAX_RANKS))
    wait_for_kernel_ahead(OVERLAP)
    exchange = tl.load(mailbox + (row + 1) * _LINE + _EXCHANGES)
    own = tl.load(x + at, mask=inside, other=0.0)
    before = tl.load(residual + at, mask=inside, other=0.0)
    if HAS_DELTA:
        own = rounded_sum(own, tl.load(delta + at, mask=inside, other=0.0))
    tl.store(_place(_address_of(mailboxes, RANK), row, exchange, x) + column, own, mask=inside)
    _tell_peers(mailboxes, row, exchange, RANK, RANKS)
    tl.store(mailbox + (row + 1) * _LINE + _EXCHANGES, exchange + 1)
    # All programs are on the device now: the next kernel can get ready, and keeps none of them out.
    let_next_kernel_start(OVERLAP)
    _wait_for_peers(mailbox, row, exchange, RANK, RANKS)
    reduced = tl.zeros([BLOCK], dtype=tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            reduced += own.to(tl.float32)
        else:
            theirs = _place(_address_of(mailboxes, rank), row, exchange, x) + column
            reduced += tl.load(theirs, mask=inside, other=0.0).to(tl.float32)
    _add_and_norm(reduced, before, scale, total + at, normed + at, inside, epsilon, COLUMNS)


@triton.jit
def add_norm_rows(
    x, residual, weight, total, normed, epsilon,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The same for x that is reduced already, of any number of rows."""
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    at = tl.program_id(0).to(tl.int64) * COLUMNS + column
    scale = tl.load(weight + column, mask=inside, other=0.0)
    wait_for_kernel_ahead(OVERLAP)
    let_next_kernel_start(OVERLAP)
    reduced = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(residual + at, mask=inside, other=0.0)
    _add_and_norm(reduced, before, scale, total + at, normed + at, inside, epsilon, COLUMNS)
