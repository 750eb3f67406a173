"""All-reduce, residual addition and RMSNorm of a row by one to eight programs, with LoRA's h = A x of the result if it
is wanted; and residual and norm without the rest.

A row is cut in parts of columns, each a *unit* with a program of its own. Every rank has a *mailbox* in symmetric
memory, int64 words: the addresses of all ranks' mailboxes; for each unit a line of `_LINE` words, in which each peer
leaves the number of the exchange that its unit is ready for, and the rank itself how many exchanges the unit has had;
for each unit a line for the squares of its row; then for each unit two places for its values.

Unit u of every rank exchanges values with unit u of the others, and with nobody else. In exchange e of its unit a
program writes its values into place e mod 2, tells the peers (release), waits until all have told it (acquire), and
reads theirs. It writes to that place again in exchange e + 2. By then every peer has told it of e + 1, and so has ended
exchange e, as a rank's kernels run one after the other. So one wait an exchange does. Numbers are kept on the device: a
CUDA graph may be replayed. They have 64 bits and do not come round.

The norm needs the squares of a whole row. A unit leaves the sum of its own in the lines of all units of the row, in one
word with a mark, waits until its own line has all of them, adds them up in the order that all have, and clears the
line. Nothing else passes this way, so no order of other reads and writes is asked for. The line is clear when the next
launch writes to it: programs write when the launch ahead has ended (`wait_for_kernel_ahead`). No number is needed, and
none would do: units of a row have had different numbers of exchanges, as calls differ in rows and parts.

What must hold: all ranks launch the same calls in the same order, each on one stream; and all programs of a launch, one
for each unit, fit on the device at once, or those that wait could keep out those that others wait for.
"""

import triton
import triton.language as tl

from bdlora_compile.runtime.kernels.fields import let_next_kernel_start, wait_for_kernel_ahead
from bdlora_compile.runtime.kernels.norm_lora import (
    dot,
    first_rows_of_product,
    load_a,
    lora_of_product,
    product_of_slot,
    site_of_slot,
    store_h,
    store_narrow_h,
)

MAX_RANKS: tl.constexpr = tl.constexpr(8)
MAX_ROWS: tl.constexpr = tl.constexpr(128)
"""Rows of one call, and units."""
PLACE_BYTES: tl.constexpr = tl.constexpr(32768)
"""Bytes of a unit's values, at most."""
_LINE: tl.constexpr = tl.constexpr(16)
"""Words of a line of the cache, 128 bytes: units do not share one."""
_EXCHANGES: tl.constexpr = tl.constexpr(8)
"""Where in its line a unit's own number stands; before it those of the ranks."""
_SQUARES: tl.constexpr = tl.constexpr(16 + 128 * 16)
"""The first word behind the addresses (one line) and the units' lines: the lines for squares."""
_PLACES: tl.constexpr = tl.constexpr(16 + 128 * 16 + 128 * 16)
"""The first word behind those."""
MAILBOX_WORDS = _PLACES.value + MAX_ROWS.value * 2 * PLACE_BYTES.value // 8
_VARYING = ["num_slots", "site0", "site1", "site2", "site_before"]
"""Numbers that differ from layer to layer: one compiled kernel serves all of them."""


@triton.jit
def _address_of(mailboxes, rank: tl.constexpr):
    """The address of a rank's mailbox, of those of all ranks [MAX_RANKS]."""
    return tl.sum(tl.where(tl.arange(0, MAX_RANKS) == rank, mailboxes, 0), axis=0)


@triton.jit
def _place(mailbox, unit, exchange, values):
    """Where the values of a unit lie in a mailbox, which is given by address; a pointer like ``values``."""
    address = mailbox + _PLACES * 8 + (unit.to(tl.int64) * 2 + (exchange & 1)) * PLACE_BYTES
    return tl.multiple_of(address.to(values.dtype), 16)


@triton.jit
def _tell_peers(mailboxes, unit, exchange, RANK: tl.constexpr, RANKS: tl.constexpr):
    """All that the program wrote before is there for who sees the number."""
    peers = tl.arange(0, MAX_RANKS)
    is_peer = (peers < RANKS) & (peers != RANK)
    lines = mailboxes + ((unit + 1) * _LINE + RANK) * 8
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
def _wait_for_peers(mailbox, unit, exchange, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Until the peers' values of this exchange are there; for ever if one is lost (see `runtime/step_watch.py`)."""
    line = mailbox + (unit + 1) * _LINE
    told = _told(line, exchange, RANK, RANKS)
    while told <= exchange:
        told = _told(line, exchange, RANK, RANKS)
    tl.debug_barrier()


@triton.jit
def _leave_squares(mailbox, unit, squares, PARTS: tl.constexpr):
    """The sum of a unit's squares, float32, for all units of its row and itself: a word with a mark above the value."""
    word = (squares.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (1 << 32)
    units = unit // PARTS * PARTS + tl.arange(0, PARTS)
    words = tl.zeros([PARTS], dtype=tl.int64) + word
    tl.atomic_xchg(mailbox + _SQUARES + units * _LINE + unit % PARTS, words, sem="relaxed", scope="gpu")


@triton.jit
def _squares_left(words, PARTS: tl.constexpr):
    """The words that are there, [PARTS]; by an atomic addition, which reads what others write meanwhile."""
    return tl.atomic_add(words, tl.zeros([PARTS], dtype=tl.int64), sem="relaxed", scope="gpu")


@triton.jit
def _squares_of_row(mailbox, unit, PARTS: tl.constexpr):
    """The sum of a row's squares, when all its units have left theirs; the same bits in all. The line is clear then."""
    words = mailbox + _SQUARES + unit * _LINE + tl.arange(0, PARTS)
    left = _squares_left(words, PARTS)
    while tl.min(left, axis=0) == 0:
        left = _squares_left(words, PARTS)
    # No thread clears what another has yet to read.
    tl.debug_barrier()
    tl.store(words, tl.zeros([PARTS], dtype=tl.int64))
    return tl.sum((left & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True), axis=0)


@triton.jit
def _add(reduced, before):
    """residual + reduced, which is in float32; rounded where transformers' layers round."""
    return (reduced.to(before.dtype).to(tl.float32) + before.to(tl.float32)).to(before.dtype)


@triton.jit
def _store_norm(summed, scale, root, normed, inside):
    """The norm of a sum whose root mean square is 1 / root."""
    scaled = (summed.to(tl.float32) * root).to(summed.dtype)
    tl.store(normed, (scale.to(tl.float32) * scaled.to(tl.float32)).to(summed.dtype), mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def all_reduce_add_norm_rows(
    x, residual, weight, mailbox, total, normed, epsilon,
    pool, slots, scales, token_slot, h, before, num_slots, width, site0, site1, site2, site_before,
    RANK: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    N_SITES: tl.constexpr, ROWS: tl.constexpr, IN: tl.constexpr, ROWS_BEFORE: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (rows * PARTS). x, residual, total, normed: [rows, COLUMNS]; weight [COLUMNS]; mailbox: this rank's, int64.

    The sum over the ranks is taken in float32 in their order and rounded once, so all have the same bits.

    N_SITES above 0: h float32 [PLANES, rows, N_SITES, width], the planes' sum A times the norm of each token with an
    adapter. It is taken of the norm before it is rounded, so that the product with A need not wait for the other units'
    squares; ROWS of A's rows are held from the start, of all sites together, and the others follow.

    IN above 0: x is the product of ``before`` [rows, IN] without its LoRA, which is added here; ROWS_BEFORE rows of its
    factors are held from the start, of A with BLOCK_K columns.

    OVERLAP: weight, addresses, slots and factors are read before the kernel ahead in the stream has ended; the next one
    may start while this one waits for the peers.
    """
    unit = tl.program_id(0)
    row, part = unit // PARTS, unit % PARTS
    within = tl.arange(0, BLOCK)
    inside = within < COLUMNS // PARTS
    column = part * (COLUMNS // PARTS) + within
    at = row.to(tl.int64) * COLUMNS + column
    scale = tl.load(weight + column, mask=inside, other=0.0)
    mailboxes = tl.load(mailbox + tl.arange(0, MAX_RANKS))
    if N_SITES > 0 or IN > 0:
        slot = tl.load(token_slot + row)
    if IN > 0:
        product = product_of_slot(pool, slots, scales, site_before, slot, num_slots, IN, COLUMNS)
        rows_before = first_rows_of_product(product, column, inside, COLUMNS, ROWS_BEFORE, BLOCK_K)
    if N_SITES > 0:
        q = site_of_slot(slots, site0, slot, num_slots, slot >= 0, COLUMNS)
        k = site_of_slot(slots, site1, slot, num_slots, (slot >= 0) & (N_SITES > 1), COLUMNS)
        v = site_of_slot(slots, site2, slot, num_slots, (slot >= 0) & (N_SITES > 2), COLUMNS)
        end = q[1] + k[1] + v[1]
        first_rows = tl.arange(0, ROWS)
        is_wide = (q[3] % 8 == 0) & (k[3] % 8 == 0) & (v[3] % 8 == 0)
        early = tl.where(is_wide, tl.minimum(end, ROWS), 0)
        factor = load_a(pool, q, k, v, first_rows, early, column, inside)
    wait_for_kernel_ahead(OVERLAP)
    exchange = tl.load(mailbox + (unit + 1) * _LINE + _EXCHANGES)
    own = tl.load(x + at, mask=inside, other=0.0)
    carried = tl.load(residual + at, mask=inside, other=0.0)
    if IN > 0:
        row_before = before + row.to(tl.int64) * IN
        added = lora_of_product(product, rows_before, row_before, column, inside, COLUMNS, ROWS_BEFORE, BLOCK_K)
        own = (own.to(tl.float32) + added).to(own.dtype)
    tl.store(_place(_address_of(mailboxes, RANK), unit, exchange, x) + within, own, mask=inside)
    _tell_peers(mailboxes, unit, exchange, RANK, RANKS)
    tl.store(mailbox + (unit + 1) * _LINE + _EXCHANGES, exchange + 1)
    # All programs are on the device now: the next kernel can get ready, and keeps none of them out.
    let_next_kernel_start(OVERLAP)
    _wait_for_peers(mailbox, unit, exchange, RANK, RANKS)
    reduced = tl.zeros([BLOCK], dtype=tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            reduced += own.to(tl.float32)
        else:
            theirs = _place(_address_of(mailboxes, rank), unit, exchange, x) + within
            reduced += tl.load(theirs, mask=inside, other=0.0).to(tl.float32)
    summed = _add(reduced, carried)
    exact = summed.to(tl.float32)
    squares = tl.sum(exact * exact, axis=0)
    if PARTS > 1:
        _leave_squares(mailbox, unit, squares, PARTS)
    tl.store(total + at, summed, mask=inside)
    if N_SITES > 0:
        value = scale.to(tl.float32) * exact
        products = dot(factor, value)
    if PARTS > 1:
        squares = _squares_of_row(mailbox, unit, PARTS)
    root = tl.rsqrt(squares / COLUMNS + epsilon)
    _store_norm(summed, scale, root, normed + at, inside)
    if N_SITES > 0:
        store_h(h, products * root, q, k, first_rows, early, unit, width, N_SITES, PARTS)
        if is_wide:
            for first in range(ROWS, end, ROWS):
                rows = first + tl.arange(0, ROWS)
                products = dot(load_a(pool, q, k, v, rows, end, column, inside), value)
                store_h(h, products * root, q, k, rows, end, unit, width, N_SITES, PARTS)
        else:
            store_narrow_h(
                h, pool, q, k, v, end, total + row.to(tl.int64) * COLUMNS, weight, root, unit, width,
                COLUMNS, N_SITES, PARTS,
            )  # fmt: skip


@triton.jit
def add_norm_rows(
    x, residual, weight, total, normed, epsilon,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The sum with the residual and its norm for x that is reduced already, of any number of rows. Grid (rows)."""
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    at = tl.program_id(0).to(tl.int64) * COLUMNS + column
    scale = tl.load(weight + column, mask=inside, other=0.0)
    wait_for_kernel_ahead(OVERLAP)
    let_next_kernel_start(OVERLAP)
    reduced = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(residual + at, mask=inside, other=0.0)
    summed = _add(reduced, before)
    tl.store(total + at, summed, mask=inside)
    exact = summed.to(tl.float32)
    root = tl.rsqrt(tl.sum(exact * exact, axis=0) / COLUMNS + epsilon)
    _store_norm(summed, scale, root, normed + at, inside)
