"""Agreement through a store: ranks as threads over one store."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from bdlora_compile.errors import AgreementError
from bdlora_compile.runtime import agreement
from bdlora_compile.runtime.agreement import DEFAULT_TIMEOUT, StoreAgreement, is_lost_rank, require_equal
from bdlora_compile.runtime.pending import Pending, in_background

SHORT = timedelta(seconds=1)


def ranks(count: int) -> list[StoreAgreement]:
    store = HashStore()
    return [StoreAgreement(store, rank, count, SHORT) for rank in range(count)]


def together(calls: list[tuple[StoreAgreement, str]]) -> list[object]:
    """What each rank gets, or the error that it raises."""

    def one(call: tuple[StoreAgreement, str]) -> object:
        try:
            require_equal(call[0], "topic", call[1])
        except AgreementError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def test_equal_texts_agree_in_every_round() -> None:
    members = ranks(3)
    for number in range(4):
        assert together([(member, f"text {number}") for member in members]) == [None] * 3


def test_every_rank_hears_of_a_difference_and_where_it_is() -> None:
    members = ranks(2)
    errors = together([(members[0], "same\nleft"), (members[1], "same\nright")])
    assert all("topic of rank 1, line 2" in str(error) and "right" in str(error) for error in errors)


def test_a_rank_that_says_nothing_is_named_after_the_limit() -> None:
    first, _ = ranks(2)
    with pytest.raises(AgreementError, match="rank 1, at exchange") as caught:
        first.exchange("topic", "text")
    assert "nothing after 1 s" in str(caught.value)


def outcome(member: StoreAgreement, topic: str = "topic") -> str:
    """What an exchange comes to."""
    try:
        return ",".join(member.exchange(topic, "text"))
    except AgreementError as error:
        return str(error)


def test_a_rank_that_comes_late_learns_that_the_others_gave_up() -> None:
    """It finds every text, and still must not go on alone; the next exchange is in step again."""
    store = HashStore()
    first, second = (StoreAgreement(store, rank, 2, SHORT / 4) for rank in range(2))
    assert "rank 1, at exchange 0" in outcome(first)
    assert "this rank, at exchange 0" in outcome(second)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(outcome, (first, second))) == ["text,text"] * 2


class Slow:
    """A store that takes its time to tell that a rank knows who is lost."""

    def __init__(self, store: HashStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def set(self, key: str, value: str) -> None:
        if "told" in key:
            time.sleep(0.3)
        self._store.set(key, value)


def leaves() -> tuple[bool, str, float]:
    """Rank 0 of 3 gives up on rank 1: whether rank 2 knew it when rank 0 was done, what rank 2 says, and when."""
    store = HashStore()
    first = StoreAgreement(store, 0, 3, SHORT / 4)
    slow: Any = Slow(store)
    patient = StoreAgreement(slow, 2, 3, 60 * SHORT)

    def done() -> bool:
        outcome(first)
        return bool(store.check(["0/told/2"]))

    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        known, said = pool.submit(done), pool.submit(outcome, patient)
        return known.result(), said.result(), time.monotonic() - start


def test_rank_0_leaves_when_the_others_know_who_is_lost() -> None:
    """Its process may hold the store; a rank with more patience hears what the others found meanwhile."""
    known, said, seconds = leaves()
    assert known
    assert "rank 1, at exchange 0" in said
    assert seconds < 10


def test_rank_0_that_does_not_wait_leaves_others_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin."""
    monkeypatch.setattr(agreement, "_LEAVE", timedelta(milliseconds=1))
    known, _, _ = leaves()
    assert not known


def test_rank_0_does_not_wait_for_ever() -> None:
    """Ranks 1 and 2 are lost, and one is named."""
    start = time.monotonic()
    assert "rank 1, at exchange 0" in outcome(StoreAgreement(HashStore(), 0, 3, SHORT / 4))
    assert time.monotonic() - start < 4


def test_an_impatient_rank_follows_one_that_has_heard_all() -> None:
    """Its patience ends in the moment between another's last reading and its own verdict."""
    store = HashStore()
    store.set("0/0", "topic\ntext")
    store.compare_set("0/verdict", "", "complete")  # rank 0 is done, and its own text is all that it saw in time
    second = StoreAgreement(store, 1, 2, timedelta(0))
    assert outcome(second) == "text,text"


def test_what_all_ranks_have_announced_is_known_without_waiting() -> None:
    """And forgotten; where the store has gone there is nothing to wait for, and the next exchange says so."""
    store = HashStore()
    before = store.num_keys()
    first, second = (StoreAgreement(store, rank, 2, SHORT) for rank in range(2))
    first.announce("read/3")
    second.announce("read/4")
    assert not first.all_announced("read/3")
    second.announce("read/3")
    assert first.all_announced("read/3")
    for rank in (first, second):
        rank.retract("read/3")
        rank.retract("read/4")
    assert store.num_keys() == before

    class Gone(HashStore):
        def check(self, *_: object) -> bool:
            raise dist.DistNetworkError("connection closed")

    assert StoreAgreement(Gone(), 0, 2, SHORT).all_announced("read/3")


def test_a_background_read_is_over_when_all_ranks_have_read() -> None:
    store = HashStore()
    first, second = (StoreAgreement(store, rank, 2, SHORT) for rank in range(2))
    reading = in_background(lambda: "content", lambda: first.announce("read/0"))
    pending = Pending(reading, lambda: first.all_announced("read/0"), reading.result)
    pending.wait(timedelta(seconds=0.1))
    assert reading.done()
    assert not pending.is_staged, "the other rank's disk is slow"
    second.announce("read/0")
    pending.wait()
    assert pending.is_staged
    assert pending.commit() == "content"


def test_ranks_at_different_calls_are_told_at_once() -> None:
    members = ranks(2)
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(outcome, members, ("load of adapter 'a'", "load of adapter 'b'"))
    assert "found its load of adapter 'b'" in first
    assert "found its load of adapter 'a'" in second
    assert time.monotonic() - start < SHORT.total_seconds()


def test_the_store_does_not_grow() -> None:
    store = HashStore()
    members = [StoreAgreement(store, rank, 2, SHORT) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            assert list(pool.map(outcome, members)) == ["text,text"] * 2
    assert store.num_keys() <= 3 * 3


def test_a_lost_rank_is_an_error_within_thirty_seconds_by_default() -> None:
    assert timedelta(seconds=30) >= DEFAULT_TIMEOUT + agreement._GRACE
    store = HashStore()
    member = StoreAgreement(store, 0, 2, setup_timeout=SHORT / 4)
    with pytest.raises(AgreementError, match=r"nothing after 0.25 s"):
        require_equal(member, "collectives", "text")


def test_ranks_whose_forward_failed_name_the_one_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later exchanges end at once with the same error."""
    monkeypatch.setattr(agreement, "_ROLL_CALL", SHORT / 2)
    first, second, _ = ranks(3)
    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(lambda member: str(member.give_up("Connection closed")), (first, second)))
    assert all("(Connection closed); nothing is heard of rank 2, expected all ranks" in error for error in errors)
    start = time.monotonic()
    assert outcome(first) == errors[0]
    assert time.monotonic() - start < 0.1


def test_a_rank_whose_forward_fails_late_is_not_the_lost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over gloo it waits until those that waited for the lost one end: they could not tell it from that."""
    monkeypatch.setattr(agreement, "_ROLL_CALL", SHORT / 2)
    first, _, late = ranks(3)
    assert "nothing is heard of rank 1, 2, one of which at least is lost" in str(first.give_up("Connection closed"))
    monkeypatch.setattr(agreement, "_ROLL_CALL", 60 * SHORT)
    start = time.monotonic()
    assert "; nothing is heard of rank 1, expected all ranks" in str(late.give_up("Connection closed"))
    assert time.monotonic() - start < 10


def test_a_collective_that_failed_on_all_ranks_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_ROLL_CALL", SHORT)
    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(lambda member: str(member.give_up("")), ranks(2)))
    assert all("(no details), expected all ranks" in error for error in errors)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (dist.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_errors_of_collectives_are_told_from_others(error: RuntimeError, lost: bool) -> None:
    assert is_lost_rank(error) is lost
