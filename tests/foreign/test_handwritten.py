"""Hand-written S-LoRA blocks in two styles: LoRA collectives go, results stay."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from slora_blocks import ModuleBlock, Whole, functional_block, world
from torch import Tensor

from bdlora_compile.ir import Origin
from bdlora_compile.runtime.agreement import Alone
from bdlora_compile.runtime.foreign_program import parts_for_ranks
from tests.foreign import harness
from tests.foreign.harness import Block, capture, run_all_ranks
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


class Reshaped(ModuleBlock):
    """B of ``down`` scaled on its way to the product, and its output features in another order."""

    def __init__(self, weights: Whole, reverse: bool, by_rank: bool) -> None:
        super().__init__(weights)
        self.down.forward = self.run_down  # type: ignore[method-assign]  # the same layer, written in another way
        self.reverse = reverse
        # A number of its own on each rank: legal, and not to be moved to other ranks' parts.
        self.factor = float(dist.get_rank() + 1) if by_rank else 3.0

    def run_down(self, x: Tensor) -> Tensor:
        """`RowLora.forward` with B changed in the graph."""
        layer = self.down
        y = F.linear(x, layer.weight)
        h = funcol.all_reduce(F.linear(x, layer.lora_a), "sum", world())
        b = torch.cat(layer.lora_b.chunk(2)[::-1]) if self.reverse else layer.lora_b
        own = b.shape[0]
        y[..., dist.get_rank() * own : (dist.get_rank() + 1) * own] += F.linear(h, b * self.factor)
        return funcol.all_reduce(y, "sum", world())


def dense(weights: Whole, x: Tensor, reverse: bool, by_rank: bool) -> Tensor:
    """What two ranks of `Reshaped` compute."""
    parts = weights.down_b.chunk(2)
    if reverse:
        parts = tuple(torch.cat(part.chunk(2)[::-1]) for part in parts)
    factors = (1.0, 2.0) if by_rank else (3.0, 3.0)
    b = torch.cat([part * factor for part, factor in zip(parts, factors, strict=True)])
    return replace(weights, down_b=b / weights.scale).reference(x)


@pytest.mark.parametrize(
    ("reverse", "by_rank", "left"),
    [(False, False, 0), (True, False, 1), (False, True, 0)],
    ids=["scaled", "reordered", "scaled by rank"],
)
def test_what_happens_to_a_factor_before_its_product(reverse: bool, by_rank: bool, left: int) -> None:
    """A scale goes along; another order of outputs is left; a scale by rank is refused where ranks compare notes."""
    weights = whole(2)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    results, runs = run_all_ranks(lambda rank: lambda: Reshaped(weights, reverse, by_rank), 2, x)
    assert all(run.report.stages[-1].census.total(Origin.LORA) == left for run in runs)
    is_right = relative_error(results[0], dense(weights, x, reverse, by_rank)) < TOLERANCE
    # In this harness ranks do not compare notes: that a scale by rank goes wrong here is why they must.
    assert is_right != by_rank


class TwoRanks(Alone):
    """Two ranks' notes: this rank's, changed, stand for the other's."""

    def __init__(self, change: Callable[[str], str]) -> None:
        self.change = change

    def exchange(self, topic: str, text: str, *, is_setup: bool = False) -> list[str]:
        return [text, self.change(text)]


@pytest.mark.parametrize("scale", ["3.0", "4.0"])
def test_a_scale_that_differs_between_ranks_is_refused(scale: str) -> None:
    weights = whole(2)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    agreement = TwoRanks(lambda text: text.replace("False, 3.0)", f"False, {scale})"))
    run = capture(lambda: Reshaped(weights, False, False), 0, 2, x, agreement=agreement)
    left = run.report.stage("localize declared").stats.refusals
    assert [("rank 1 has another" in refusal.reason) for refusal in left] == [True] * (scale != "3.0")
