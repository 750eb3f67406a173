"""Folding all-reduces: what it finds, what it must leave, and that the sums stay the same."""

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from bdlora_compile.collectives import ALL_REDUCE
from bdlora_compile.ir import Captured, Fact, operator_name
from bdlora_compile.passes.fold import Fold
from bdlora_compile.placement import Replicate, Shard
from bdlora_compile.printer import print_graph
from bdlora_compile.runtime.lockstep import run_ranks
from tests.conftest import GoldenCheck
from tests.passes.graphs import TAGGED, GraphBuilder, plan_of, require_idempotent, run

PLAN = plan_of(2)
FACTS = TAGGED | {Fact.PARTITIONED}
Sharded = Callable[[GraphBuilder], Node]


def reduced(build: GraphBuilder, value: Node, how: str = "sum") -> Node:
    started = build.call(torch.ops._c10d_functional.all_reduce.default, value, how, "group")
    return build.call(torch.ops._c10d_functional.wait_tensor.default, started)


def two_sums() -> Captured:
    """all_reduce(a) + all_reduce(b)."""
    build = GraphBuilder()
    a, b = build.input("a", 2, 8), build.input("b", 2, 8)
    return build.finish(build.call(operator.add, reduced(build, a), reduced(build, b)), facts=FACTS)


def sum_and_product(weight_is_whole: bool = True, bias: bool = False, how: str = "sum") -> Captured:
    """all_reduce(a) + linear(all_reduce(z), B), as PEFT's LoRA on a row-parallel layer."""
    build = GraphBuilder()
    a, z = build.input("a", 2, 8), build.input("z", 2, 4)
    b = build.weight("lora_B", 8, 4, placement=Replicate() if weight_is_whole else Shard(0, 2))
    biases = [build.weight("bias", 8, placement=Replicate())] if bias else []
    product = build.linear(reduced(build, z, how), b, *biases)
    return build.finish(build.call(operator.add, reduced(build, a), product), facts=FACTS)


def sum_read_twice() -> Captured:
    build = GraphBuilder()
    a, b = build.input("a", 2, 8), build.input("b", 2, 8)
    first = reduced(build, a)
    total = build.call(operator.add, first, reduced(build, b))
    return build.finish(total, first, facts=FACTS)


def sum_and_plain() -> Captured:
    build = GraphBuilder()
    a, b = build.input("a", 2, 8), build.input("b", 2, 8)
    return build.finish(build.call(operator.add, reduced(build, a), b), facts=FACTS)


def sums_that_broadcast() -> Captured:
    build = GraphBuilder()
    a, b = build.input("a", 2, 8), build.input("b", 1, 8)
    return build.finish(build.call(operator.add, reduced(build, a), reduced(build, b)), facts=FACTS)


def num_reduces(captured: Captured) -> int:
    return sum(operator_name(node) == ALL_REDUCE for node in captured.graph.nodes)


@pytest.mark.parametrize("make", [two_sums, sum_and_product], ids=lambda make: make.__name__)
def test_two_reductions_become_one(make: Callable[[], Captured], golden: GoldenCheck) -> None:
    captured = make()
    assert run(Fold(), captured, PLAN).matches == 1
    golden(f"fold_{make.__name__}", print_graph(captured.graph))
    assert num_reduces(captured) == 1
    require_idempotent(Fold(), captured, PLAN)


@pytest.mark.parametrize(
    "make",
    [
        sum_read_twice,
        sum_and_plain,
        sums_that_broadcast,
        lambda: sum_and_product(weight_is_whole=False),
        lambda: sum_and_product(bias=True),
        lambda: sum_and_product(how="avg"),
    ],
    ids=["read twice", "plain summand", "broadcast", "cut weight", "bias", "average"],
)
def test_what_must_not_fold_is_left(make: Callable[[], Captured]) -> None:
    captured = make()
    before = print_graph(captured.graph)
    assert run(Fold(), captured, PLAN).matches == 0
    assert print_graph(captured.graph) == before


def results(captured: Captured, ranks: list[list[Tensor]]) -> list[Tensor]:
    return [result[0] for result in run_ranks(captured.graph, ranks)]


def test_folding_keeps_the_sum() -> None:
    """Two ranks in float64: 1e-12 is far above rounding and far below any of the values."""
    torch.manual_seed(0)
    b = torch.randn(8, 4, dtype=torch.float64)
    ranks = [[torch.randn(2, 8, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64), b] for _ in range(2)]
    captured = sum_and_product()
    expected = ranks[0][0] + ranks[1][0] + (ranks[0][1] + ranks[1][1]) @ b.t()
    run(Fold(), captured, PLAN)
    for found in results(captured, ranks):
        assert (found - expected).abs().max() < 1e-12


def test_folding_a_bias_would_be_noticed() -> None:
    """The twin: summing after a biased product counts the bias once a rank, and the comparison sees it."""
    torch.manual_seed(0)
    b, bias = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    z = [torch.randn(2, 4, dtype=torch.float64) for _ in range(2)]
    folded = sum(part @ b.t() + bias for part in z)
    assert (folded - ((z[0] + z[1]) @ b.t() + bias)).abs().max() > 1e-3
