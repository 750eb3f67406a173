"""Agreement through a store: ranks as threads over one store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore

from bdlora_compile.errors import AgreementError
from bdlora_compile.runtime.agreement import StoreAgreement, require_equal

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
