"""What the ranks of a process group must have in common, compared through the group's store.

Never through a collective: a rank that did not reach the comparison would hang all others. An exchange ends the same
way on every rank, however late one is: the first rank to finish or to lose patience writes the verdict of the round
(one atomic operation of the store), and all others follow it. Where it says that a rank is lost, a text is put in that
rank's place, so that nobody goes on waiting for it, and rank 0 waits until the others have read the verdict: the store
may end with its process, and they would take that for the loss.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import Protocol, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import ProcessGroup

from bdlora_compile.errors import AgreementError

DEFAULT_TIMEOUT = timedelta(seconds=25)
"""How long ranks wait for one another while they serve. With `_GRACE`, a lost rank is an error after at most 30 s."""
SETUP_TIMEOUT = timedelta(seconds=120)
"""The same while a model is loaded or compiled, when ranks may be far apart."""

_T = TypeVar("_T")

_COMPLETE = "complete"
_LOST = "lost"
"""In the place of a text that did not come; whoever finds it reads the verdict next."""
_GRACE = timedelta(seconds=5)
"""How much longer than the ranks' time limit an exchange may take before the store itself is given up."""
_ROLL_CALL = timedelta(seconds=5)
"""How long a rank whose forward failed waits for the others to say that theirs did: who says nothing is named."""
_LEAVE = timedelta(seconds=2)
"""How long rank 0 waits for others to read which rank is lost."""


class Agreement(Protocol):
    """Exchange of short texts between the ranks."""

    def exchange(self, topic: str, text: str, *, is_setup: bool = False) -> Sequence[str]:
        """Publish ``text`` and return every rank's text, in rank order; it succeeds on all ranks or on none.

        Args:
            topic: what is compared; the same on all ranks.
            text: this rank's.
            is_setup: the model is being loaded or compiled: other ranks may need longer.

        Raises:
            AgreementError: a rank did not publish within the time limit, or is at another topic.
        """
        ...

    def announce(self, what: str) -> None:
        """Say that this rank has come to something; from any thread, and without waiting for other ranks."""
        ...

    def all_announced(self, what: str) -> bool:
        """Whether every rank has; True also where they cannot be asked any more, which the next exchange tells."""
        ...

    def retract(self, what: str) -> None:
        """Forget what this rank said, once all have looked."""
        ...

    def give_up(self, reason: str) -> AgreementError:
        """The error of a forward whose collective failed, which names the ranks of which nothing is heard.

        Exchanges raise it from then on. It takes some seconds: ranks fail one after the other.
        """
        ...


class Alone:
    """Agreement of a process that has no peers (one rank, the fake process group, all ranks in one process)."""

    def exchange(self, topic: str, text: str, *, is_setup: bool = False) -> Sequence[str]:
        return [text]

    def announce(self, what: str) -> None: ...

    def all_announced(self, what: str) -> bool:
        return True

    def retract(self, what: str) -> None: ...

    def give_up(self, reason: str) -> AgreementError:
        return _lost_in_forward(reason, "")


class StoreAgreement:
    """Agreement through a process group's store.

    All ranks must call `exchange` in the same order. Texts of the exchange before the last are deleted, so the store
    does not grow.

    Args:
        store: the group's store; each model uses a prefix of its own.
        rank, size: this rank and the number of ranks.
        timeout: how long a rank waits for all others together.
        setup_timeout: the same while the model is loaded or compiled; ``timeout`` by default.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout: timedelta = DEFAULT_TIMEOUT,
        setup_timeout: timedelta | None = None,
    ) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._timeout = timeout
        self._setup_timeout = setup_timeout or timeout
        self._round = 0
        self._mine: list[list[str]] = []
        self._lost: AgreementError | None = None

    @property
    def forward_limits(self) -> tuple[timedelta, timedelta]:
        """How long a forward may take, and the first of a graph: with `give_up`'s roll call it is over in time."""
        serving, setup = (max(limit - _ROLL_CALL, limit / 2) for limit in (self._timeout, self._setup_timeout))
        return serving, setup

    def exchange(self, topic: str, text: str, *, is_setup: bool = False) -> Sequence[str]:
        if self._lost is not None:
            # An exchange that was given up may still have come to an end on the other ranks.
            raise self._lost
        number, self._round = self._round, self._round + 1
        limit = self._setup_timeout if is_setup else self._timeout
        try:
            return _within(limit + _GRACE, lambda: self._exchange(number, topic, text, limit))
        except (dist.DistError, RuntimeError, TimeoutError) as error:
            self._lost = AgreementError(
                f"store of the process group, at exchange {number}",
                found=f"an error: {(str(error) or type(error).__name__).splitlines()[0]}",
                expected=f"the ranks' {topic}",
                remedy="start all ranks again; the process that holds the store (rank 0, or the launcher) died or hung",
            )
            raise self._lost from error

    def announce(self, what: str) -> None:
        with suppress(dist.DistError, RuntimeError):
            self._store.set(f"{what}/{self._rank}", "1")

    def all_announced(self, what: str) -> bool:
        try:
            return self._store.check([f"{what}/{rank}" for rank in range(self._size)])
        except (dist.DistError, RuntimeError):
            return True

    def retract(self, what: str) -> None:
        with suppress(dist.DistError, RuntimeError):
            self._store.delete_key(f"{what}/{self._rank}")

    def give_up(self, reason: str) -> AgreementError:
        if self._lost is None:
            try:
                who = _named(_within(_ROLL_CALL + _GRACE, self._silent_ranks))
            except (dist.DistError, RuntimeError, TimeoutError):
                who = (
                    "; nothing is heard of the process that holds the store (rank 0, or the launcher; its log may name "
                    "another rank)"
                )
            self._lost = _lost_in_forward(reason, who)
        return self._lost

    def _silent_ranks(self) -> list[int]:
        """The ranks whose forward did not fail too within some seconds."""
        self._store.set(f"failed/{self._rank}", "1")
        deadline = time.monotonic() + _ROLL_CALL.total_seconds()
        missing = [str(rank) for rank in range(self._size) if not self._came(f"failed/{rank}", deadline)]
        verdict = bytes(self._store.compare_set("failed/verdict", "", ",".join(missing) or _COMPLETE)).decode()
        silent = [int(rank) for rank in verdict.split(",")] if verdict != _COMPLETE else []
        for rank in silent:
            self._store.set(f"failed/{rank}", _LOST)
        self._leave("failed", silent)
        # A rank may fail after the others have found it silent.
        return [rank for rank in silent if rank != self._rank]

    def _came(self, key: str, deadline: float) -> bool:
        """Whether a key is there before the time is up."""
        try:
            self._store.wait([key], _until(deadline))
        except dist.DistStoreError:
            return False
        return True

    def _leave(self, about: str, silent: Sequence[int]) -> None:
        """Say that this rank knows who is lost; rank 0 leaves last, for the store may be its own."""
        self._store.set(f"{about}/told/{self._rank}", "1")
        others = [rank for rank in range(self._size) if rank not in silent]
        if self._rank == 0:
            with suppress(dist.DistStoreError):
                self._store.wait([f"{about}/told/{rank}" for rank in others], _LEAVE)

    def _exchange(self, number: int, topic: str, text: str, limit: timedelta) -> Sequence[str]:
        keys = [f"{number}/{rank}" for rank in range(self._size)]
        self._store.set(keys[self._rank], f"{topic}\n{text}")
        found, silent = self._read_all(keys, limit)
        proposal = _COMPLETE if silent is None else str(silent)
        verdict = bytes(self._store.compare_set(f"{number}/verdict", "", proposal)).decode()
        if verdict != _COMPLETE:
            if silent is not None:
                self._store.set(keys[int(verdict)], _LOST)
            self._leave(str(number), [int(verdict)])
            raise self._silence(number, topic, int(verdict), limit)
        found = found if silent is None else self._read_all(keys, limit)[0]
        self._forget(number)
        for rank, text_of_rank in enumerate(found):
            _require_topic(number, topic, rank, text_of_rank.partition("\n")[0])
        return [text_of_rank.partition("\n")[2] for text_of_rank in found]

    def _read_all(self, keys: Sequence[str], limit: timedelta) -> tuple[list[str], int | None]:
        """The texts, or the first rank that said nothing in time."""
        deadline = time.monotonic() + limit.total_seconds()
        texts = []
        for rank, key in enumerate(keys):
            if not self._came(key, deadline):
                return [], rank
            texts.append(bytes(self._store.get(key)).decode())
        return texts, None

    def _silence(self, number: int, topic: str, rank: int, limit: timedelta) -> AgreementError:
        who = "this rank" if rank == self._rank else f"rank {rank}"
        return AgreementError(
            f"{who}, at exchange {number}",
            found=f"nothing after {limit.total_seconds():g} s",
            expected=f"its {topic}",
            remedy="look at that rank's log: it died, hangs, or took another path through the program",
        )

    def _forget(self, number: int) -> None:
        # A rank may still be reading this round; all have read the one before, since they published this one.
        verdict = [f"{number}/verdict"] if self._rank == 0 else []
        self._mine.append([f"{number}/{self._rank}", *verdict])
        if len(self._mine) > 2:
            for key in self._mine.pop(0):
                self._store.delete_key(key)


def _until(deadline: float) -> timedelta:
    return timedelta(seconds=max(deadline - time.monotonic(), 0.001))


def _named(silent: Sequence[int]) -> str:
    """Who is lost, for an error's text: over gloo a rank may wait for a lost one until the others end."""
    if not silent:
        return ""
    names = ", ".join(map(str, silent))
    return f"; nothing is heard of rank {names}{', one of which at least is lost' if silent[1:] else ''}"


def _lost_in_forward(reason: str, who: str) -> AgreementError:
    return AgreementError(
        "forward",
        found=f"a collective that failed ({(reason or 'no details').splitlines()[0]:.300}){who}",
        expected="all ranks in every collective",
        remedy="look at the log of the rank that died, hangs or left the program, and start all ranks again",
    )


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether an error of a forward is that of a collective: torch has no class for those of gloo."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _within(limit: timedelta, work: Callable[[], _T]) -> _T:
    """What ``work`` returns or raises, or TimeoutError: calls of a store that hangs have no limit of their own."""
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    # A daemon: a call that never ends must not keep the process alive.
    threading.Thread(target=run, name="bdlora-agreement", daemon=True).start()
    try:
        return result.result(limit.total_seconds())
    except TimeoutError:
        raise TimeoutError(f"no answer after {limit.total_seconds():g} s") from None


def _require_topic(number: int, topic: str, rank: int, other: str) -> None:
    if other != topic:
        raise AgreementError(
            f"rank {rank}, at exchange {number}",
            found=f"its {other}",
            expected=f"its {topic}, as on this rank",
            remedy="make the same calls in the same order on every rank",
        )


def agreement_of(groups: Sequence[ProcessGroup], timeout: timedelta = SETUP_TIMEOUT) -> Agreement:
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
    """Check that all ranks have the same text, while a model is loaded or compiled.

    Raises:
        AgreementError: naming the first rank that differs from rank 0 and the first line where it does.
    """
    texts = agreement.exchange(topic, text, is_setup=True)
    for rank, other in enumerate(texts):
        if other != texts[0]:
            line, first, second = first_difference(texts[0], other)
            raise AgreementError(
                f"{topic} of rank {rank}, line {line}",
                found=second,
                expected=f"what rank 0 has: {first}",
                remedy="run the same program with the same model, inputs and adapters on every rank",
            )


def first_difference(first: str, second: str) -> tuple[int, str, str]:
    """(number, line of the first, line of the second) of the first line in which two texts differ."""
    a, b = first.splitlines(), second.splitlines()
    for number in range(max(len(a), len(b))):
        left = a[number] if number < len(a) else "<end>"
        right = b[number] if number < len(b) else "<end>"
        if left != right:
            return number + 1, left, right
    return len(a), "<end>", "<end>"
