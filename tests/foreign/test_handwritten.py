"""Hand-written S-LoRA blocks in two styles: LoRA collectives go, results stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from slora_blocks import ModuleBlock, Whole, functional_block

from bdlora_compile.ir import Origin
from bdlora_compile.runtime.foreign_program import parts_for_ranks
from tests.foreign import harness
from tests.foreign.harness import Block, run_all_ranks
from tests.models import relative_error

TOLERANCE = 1e-12
"""float64 throughout: 1e-15 is measured."""

STYLES: dict[str, Callable[..., Block]] = {"modules": ModuleBlock, "function": functional_block}


def whole(nblocks: int) -> Whole:
    torch.manual_seed(0)
    return Whole.random(width=16, inner=48, rank=24, nblocks=nblocks)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("size", "nblocks"), [(2, 2), (2, 4), (4, 4)])
def test_localized_equals_dense(style: str, size: int, nblocks: int) -> None:
    """Both paths lose their collective; the layer's own all-reduce stays."""
    weights = whole(nblocks)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    results, runs = run_all_ranks(lambda rank: lambda: STYLES[style](weights), size, x)
    for result in results:
        assert relative_error(result, weights.reference(x)) < TOLERANCE
    for run in runs:
        assert run.report.stage("tag paths").census.total(Origin.LORA) == 2
        assert run.report.stages[-1].census.total(Origin.LORA) == 0
        assert run.report.stages[-1].census.total(Origin.BASE) == 1


@pytest.mark.parametrize("style", STYLES)
def test_without_a_declaration_nothing_changes(style: str) -> None:
    """No licence, although the factors are block-diagonal today; the reason says what to declare."""
    weights = whole(2)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    results, runs = run_all_ranks(lambda rank: lambda: STYLES[style](weights, declare=False), 2, x)
    for result in results:
        assert relative_error(result, weights.reference(x)) < TOLERANCE
    for run in runs:
        assert run.report.stages[-1].census.total(Origin.LORA) == 2
        reasons = [refusal.reason for refusal in run.report.stage("tag paths").stats.refusals]
        assert len(reasons) == 2
        assert all("declare_block_diagonal" in reason for reason in reasons)


def test_lengths_that_vary() -> None:
    """Sizes that are symbols: one graph for all of them."""
    weights = whole(2)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    results, runs = run_all_ranks(lambda rank: lambda: ModuleBlock(weights), 2, x, dynamic=True)
    assert relative_error(results[0], weights.reference(x)) < TOLERANCE
    assert "s" in runs[0].report.inputs[0]


def test_sabotage_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: another rank's part of B rebuilt, and the comparison fails."""
    weights = whole(2)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    monkeypatch.setattr(harness, "parts_for_ranks", lambda *args: list(reversed(parts_for_ranks(*args))))
    results, _ = run_all_ranks(lambda rank: lambda: ModuleBlock(weights), 2, x)
    assert relative_error(results[0], weights.reference(x)) > 1e-3


def refusals(build: Callable[[], Any], size: int = 2) -> dict[str, str]:
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    _, runs = run_all_ranks(lambda rank: build, size, x)
    stages = [runs[0].report.stage(name) for name in ("tag paths", "localize declared")]
    return {refusal.where: refusal.reason for stage in stages for refusal in stage.stats.refusals}


def test_data_that_contradicts_the_declaration_refuses() -> None:
    weights = whole(2)

    def build() -> Block:
        block = ModuleBlock(weights)
        with torch.no_grad():
            block.up.lora_b.fill_(1.0)
        return block

    (reason,) = refusals(build).values()
    assert "up.lora_b was declared block-diagonal, but holds other values than zero outside places 0:12" in reason


def test_blocks_that_do_not_divide_among_the_ranks_are_refused() -> None:
    found = refusals(lambda: ModuleBlock(whole(2)), size=4)
    assert len(found) == 2
    assert all("2 blocks on rank 24: they do not divide among 4 ranks" in reason for reason in found.values())
