"""What a collective costs on a machine: by its size it goes one of several ways, each a latency and bytes over a link.

    way           bytes that a rank sends, for a byte of payload
    one-shot      N - 1           every rank reads all that its peers have
    two-shot      2 (N - 1) / N   every rank reads its share of each peer, then each peer's sum
    the group's   `census.wire_share`

Only all-reduces go through symmetric memory, one-shot and two-shot (`runtime/all_reduce.py`); gathers of LoRA's h
become all-reduces there (`transport.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import sympy

from bdlora_compile.census import wire_share
from bdlora_compile.machine import CollectiveKind, Link, LinkKind, Machine


@dataclass(frozen=True, slots=True)
class Way:
    """One way of a collective over a number of ranks.

    Attributes:
        kind: whose link it is.
        largest: bytes of the largest payload that goes so, None for any size.
        link: its cost.
        sent: bytes that a rank sends for a byte of payload.
    """

    kind: LinkKind
    largest: int | None
    link: Link
    sent: sympy.Rational

    @property
    def is_symmetric(self) -> bool:
        """Whether it goes through symmetric memory."""
        return self.largest is not None

    def takes(self, payload: float) -> bool:
        """Whether a payload of so many bytes may go so."""
        return self.largest is None or payload <= self.largest

    def wire_seconds(self, payload: float) -> float:
        """Time of its bytes."""
        return float(self.sent) * payload / self.link.bandwidth


def ways(machine: Machine, kind: CollectiveKind, ranks: int, *, is_sum: bool) -> Sequence[Way]:
    """Those of a collective, in the order in which they are tried: the first that takes a payload is it.

    Args:
        is_sum: whether symmetric memory may take it: an all-reduce, or a gather that becomes one.

    Raises:
        ConfigError: the machine knows no collectives.
    """
    own = Way(kind, None, machine.link(kind, ranks), wire_share(kind, ranks))
    limits = machine.symmetric_limits(ranks)
    if limits is None or not is_sum:
        return [own]
    return [
        Way("one_shot", limits.one_shot, machine.link("one_shot", ranks), sent_through("one_shot", ranks)),
        Way("two_shot", limits.two_shot, machine.link("two_shot", ranks), sent_through("two_shot", ranks)),
        own,
    ]


def way_of(choices: Sequence[Way], payload: float) -> Way:
    """The one by which a payload of so many bytes goes, of `ways`."""
    return next(way for way in choices if way.takes(payload))


def sent_through(way: Literal["one_shot", "two_shot"], ranks: int) -> sympy.Rational:
    """Bytes that a rank sends through symmetric memory for a byte of payload."""
    return sympy.Rational(ranks - 1) if way == "one_shot" else wire_share("all_reduce", ranks)
