"""Random models, adapters, ranks and batches equal PEFT in float64: 50 fixed ones here, 500 new ones by `make nightly`.

A failure prints the smallest case that shows it, which is Python: add it to ``FIXED``, and it runs ever after.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings

from bdlora_compile import factors
from bdlora_compile.factors import LocalFactors
from bdlora_compile.strategy import Strategy
from tests.models import ALL_SITES, ATTENTION, VOCABULARY
from tests.numerics.cases import AdapterCase, Case, cases, error_of

TOLERANCE = 2e-6
"""As in test_compiled: norms and rotary angles are float32 in transformers' own code; 4e-7 is the largest measured."""

BLOCKS = Case(
    family="llama",
    heads=8,
    kv_heads=4,
    head_dim=4,
    intermediate=32,
    vocabulary=29,
    layers=1,
    tied=False,
    ranks=4,
    strategy="local",
    adapters=(AdapterCase(rank=8, nblocks=4, targets=ALL_SITES), AdapterCase(3, 0, (*ATTENTION, *VOCABULARY))),
    rows=(0, 1, -1),
    padding=(0, 2, 1),
)
TWO_EACH = replace(BLOCKS, ranks=2)
SLORA = replace(BLOCKS, strategy="slora")


RANKS: Sequence[int] = (1, 2, 3, 4, 8)
STRATEGIES: Sequence[Strategy] = ("local", "slora")
FIXED = [BLOCKS, replace(SLORA, is_dynamic=True), replace(BLOCKS, rows=(-1, -1), padding=(0, 1))]


@pytest.mark.parametrize("case", FIXED, ids=["blocks", "slora", "base only"])
def test_fixed_cases_equal_peft(case: Case) -> None:
    assert error_of(case) < TOLERANCE


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks", RANKS)
def test_random_cases_equal_peft(ranks: int, strategy: Strategy) -> None:
    """An equal share of the examples for each number of ranks and strategy; hypothesis alone would repeat a few."""
    profile = settings.get_profile(settings.get_current_profile_name())

    @settings(
        max_examples=profile.max_examples // (len(RANKS) * len(STRATEGIES)), suppress_health_check=list(HealthCheck)
    )
    @given(case=cases(ranks, strategy))
    def every_case_equals_peft(case: Case) -> None:
        assert error_of(case) < TOLERANCE

    if profile.derandomize:
        # Else every part would draw the same.
        seed(f"{ranks} {strategy}")(every_case_equals_peft)
    every_case_equals_peft()


Read = Callable[..., LocalFactors]


def blocks_of_the_next_rank(read: Read) -> Read:
    """Each rank reads the factors of the rank after it."""

    def sabotaged(found: Any, site: Any, layout: Any, rank: int, mesh: Any) -> LocalFactors:
        local = read(found, site, layout, rank, mesh)
        other = read(found, site, layout, (rank + 1) % mesh.size, mesh)
        return replace(local, a=other.a, b=other.b)

    return sabotaged


def blocks_in_another_order(read: Read) -> Read:
    """The rows of B go to the wrong rows of A: a rank's blocks, or its ranks, are shifted by one."""

    def sabotaged(found: Any, site: Any, layout: Any, rank: int, mesh: Any) -> LocalFactors:
        local = read(found, site, layout, rank, mesh)
        return replace(local, b=local.b.roll(1, 0))

    return sabotaged


def factors_swapped_at_the_vocabulary(read: Read) -> Read:
    """Only the sites of the vocabulary are wrong: ids read their neighbour's column, logits their neighbour's row."""

    def sabotaged(found: Any, site: Any, layout: Any, rank: int, mesh: Any) -> LocalFactors:
        local = read(found, site, layout, rank, mesh)
        if not site.vocabulary:
            return local
        return replace(local, a=local.a.roll(1, 0)) if site.is_lookup else replace(local, b=local.b.roll(1, 1))

    return sabotaged


@pytest.mark.parametrize("case", [BLOCKS, TWO_EACH, SLORA], ids=["G = N", "G = 2N", "slora"])
@pytest.mark.parametrize(
    "break_it", [blocks_of_the_next_rank, blocks_in_another_order, factors_swapped_at_the_vocabulary]
)
def test_sabotage_is_noticed(monkeypatch: pytest.MonkeyPatch, case: Case, break_it: Callable[[Read], Read]) -> None:
    """The twin: factors read wrongly make the comparison of this file fail."""
    monkeypatch.setattr("bdlora_compile.runtime.staging.read_local", break_it(factors.read_local))
    assert error_of(case) > 1e-3
