"""Random models, adapters, ranks and batches equal PEFT in float64: 50 fixed ones here, 500 new ones by `make nightly`.

A failure prints the smallest case that shows it, which is Python: add it as an ``@example``, to run first ever after.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings

from bdlora_compile import factors
from bdlora_compile.factors import LocalFactors
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


@pytest.mark.timeout(3600)
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(case=cases())
@example(case=BLOCKS)
@example(case=replace(SLORA, is_dynamic=True))
def test_logits_equal_peft(case: Case) -> None:
    assert error_of(case) < TOLERANCE


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
    monkeypatch.setattr("bdlora_compile.runtime.adapters.read_local", break_it(factors.read_local))
    assert error_of(case) > 1e-3
