"""What the ranks of a process group must have in common, compared through the group's store.

Never through a collective: a rank that did not reach the comparison would hang all others.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import ProcessGroup

from bdlora_compile.errors import AgreementError

DEFAULT_TIMEOUT = timedelta(seconds=120)


class Agreement(Protocol):
    """Exchange of short texts between the ranks."""

    def exchange(self, topic: str, text: str) -> Sequence[str]:
        """Publish ``text`` and return every rank's text, in rank order.

        Raises:
            AgreementError: a rank did not publish within the time limit.
        """
        ...


class Alone:
    """Agreement of a process that has no peers (one rank, the fake process group, all ranks in one process)."""

    def exchange(self, topic: str, text: str) -> Sequence[str]:
        return [text]


class StoreAgreement:
    """Agreement through a process group's store.

    All ranks must call `exchange` in the same order. Texts of the exchange before the last are deleted, so the store
    does not grow.

    Args:
        store: the group's store; each model uses a prefix of its own.
        rank, size: this rank and the number of ranks.
        timeout: how long a rank waits for the others.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._timeout = timeout
        self._round = 0
        self._mine: list[str] = []

    def exchange(self, topic: str, text: str) -> Sequence[str]:
        keys = [f"{self._round}/{topic}/{rank}" for rank in range(self._size)]
        self._round += 1
        self._store.set(keys[self._rank], text)
        texts = [self._read(key, topic, rank) for rank, key in enumerate(keys)]
        self._forget(keys[self._rank])
        return texts

    def _read(self, key: str, topic: str, rank: int) -> str:
        try:
            self._store.wait([key], self._timeout)
        except (dist.DistStoreError, RuntimeError) as error:
            seconds = self._timeout.total_seconds()
            raise AgreementError(
                f"rank {rank}, at exchange {key.rsplit('/', 1)[0]}",
                found=f"nothing after {seconds:g} s",
                expected=f"its {topic}",
                remedy="look at that rank's log: it died, hangs, or took another path through the program",
            ) from error
        return bytes(self._store.get(key)).decode()

    def _forget(self, key: str) -> None:
        # A rank may still be reading this round; all have read the one before, since they published this one.
        self._mine.append(key)
        if len(self._mine) > 2:
            self._store.delete_key(self._mine.pop(0))


def agreement_of(groups: Sequence[ProcessGroup], timeout: timedelta = DEFAULT_TIMEOUT) -> Agreement:
    """How the ranks that run a graph compare notes: those of its largest process group.

    All of them must ask in the same order: each call names a new series of exchanges.
    """
    group = max(groups, key=lambda member: member.size(), default=None)
    if group is None or group.size() == 1 or dist.get_backend(group) == "fake":
        return Alone()
    store = PrefixStore(f"bdlora/graphs/{group.group_name}", dist.distributed_c10d._get_default_store())
    number = store.add(f"count/{group.rank()}", 1)
    return StoreAgreement(PrefixStore(str(number), store), group.rank(), group.size(), timeout)


def require_equal(agreement: Agreement, topic: str, text: str) -> None:
    """Check that all ranks have the same text.

    Raises:
        AgreementError: naming the first rank that differs from rank 0 and the first line where it does.
    """
    texts = agreement.exchange(topic, text)
    for rank, other in enumerate(texts):
        if other != texts[0]:
            line, first, second = _first_difference(texts[0], other)
            raise AgreementError(
                f"{topic} of rank {rank}, line {line}",
                found=second,
                expected=f"what rank 0 has: {first}",
                remedy="run the same program with the same model, inputs and adapters on every rank",
            )


def _first_difference(first: str, second: str) -> tuple[int, str, str]:
    a, b = first.splitlines(), second.splitlines()
    for number in range(max(len(a), len(b))):
        left = a[number] if number < len(a) else "<end>"
        right = b[number] if number < len(b) else "<end>"
        if left != right:
            return number + 1, left, right
    return len(a), "<end>", "<end>"
