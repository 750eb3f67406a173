"""Blocks that were written without knowing the matcher, in six styles: localized, or left with the right reason."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

import bdlora_compile as bd
from tests.foreign.harness import Block, RankRun, run_all_ranks
from tests.foreign.held_out import closures, functional, subclassed
from tests.foreign.held_out.weights import Weights, random_weights, reference
from tests.foreign.held_out_2 import einops_like, megatron, minimal
from tests.models import relative_error

TOLERANCE = 1e-12
"""float64 throughout."""


@dataclass(frozen=True)
class Case:
    """A block, what it computes, the reasons for what must stay (a part of each), and the collectives that stay.

    One all-reduce is the layer's own.
    """

    build: Callable[..., Any]
    reference: Callable[[Weights, Tensor], Tensor] = reference
    left: tuple[str, ...] = ()
    collectives: int = 1


CASES = {
    "closures": Case(closures.build),
    "closures, rows dealt out": Case(
        closures.build_broken_interleaved, closures.reference_broken_interleaved, ("other columns of B",) * 2, 3
    ),
    "subclassed": Case(subclassed.build),
    "subclassed, normed": Case(
        subclassed.build_broken_normed, subclassed.reference_broken_normed, ("stands between",) * 2, 2
    ),
    "functional": Case(functional.build),
    "functional, gathered": Case(functional.build_gathered),
    "megatron": Case(megatron.build),
    # The rank's place is data here: nothing in the graph says which rows are written.
    "megatron, index_add": Case(megatron.build_indexed, left=("index_add",), collectives=2),
    "megatron, softcapped": Case(megatron.build_broken_softcapped, megatron.reference_broken_softcapped, ("tanh",), 2),
    # The same: a slice is placed by a product with a one-hot vector.
    "einops": Case(einops_like.build, left=("mul",), collectives=2),
    "einops, mixed": Case(einops_like.build_broken_mixed, einops_like.reference_broken_mixed, ("no matrix", "mul"), 3),
    # The summands of the result are stacked and summed, so that two all-reduces are not one.
    "minimal": Case(minimal.build, collectives=2),
    "functional, confident": Case(
        functional.build_broken_confident, functional.reference_broken_confident, ("before a second factor",), 2
    ),
}


def refusals(run: RankRun) -> list[str]:
    stages = (run.report.stage("tag paths"), run.report.stage("localize declared"))
    return [refusal.reason for stage in stages for refusal in stage.stats.refusals]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_localized_or_left(name: str, size: int) -> None:
    case = CASES[name]
    if name.startswith("einops") and TorchVersion(torch.__version__) < "2.12":
        pytest.skip("torch 2.11 gathers contiguous tensors only, and these are not")
    weights = random_weights(24, 48, 16, 4, 0)
    x = torch.randn(2, 5, 24, dtype=torch.float64)

    def build(rank: int) -> Callable[[], Block]:
        return lambda: case.build(weights, rank, size, bd.declare_block_diagonal)

    results, runs = run_all_ranks(build, size, x)
    for result in results:
        assert relative_error(result, case.reference(weights, x)) < TOLERANCE
    for run in runs:
        found = refusals(run)
        assert len(found) == len(case.left), found
        assert all(part in reason for part, reason in zip(case.left, found, strict=True)), found
        assert run.report.stages[-1].census.total() == case.collectives
