"""Canonicalize: guards of hollow modules, bookkeeping and known sizes go; everything else stays."""

import operator

import torch

from bdlora_compile.ir import operator_name
from bdlora_compile.passes.canonicalize import Canonicalize
from bdlora_compile.printer import print_graph
from tests.conftest import GoldenCheck
from tests.passes.graphs import GraphBuilder, plan_of, require_idempotent, run

PLAN = plan_of(1)


def test_guards_bookkeeping_and_known_sizes_go(golden: GoldenCheck) -> None:
    build = GraphBuilder()
    x = build.input("x", 2, 8)
    guarded = build.call(torch.ops.bdlora.shard_only.default, x, "model.norm")
    build.call(torch._C._set_grad_enabled, False)
    length = build.call(operator.getitem, build.call("size", guarded), 0)
    captured = build.finish(build.call("view", guarded, length, 8), facts=frozenset())
    assert run(Canonicalize(), captured, PLAN).matches == 3
    golden("canonicalize", print_graph(captured.graph))
    require_idempotent(Canonicalize(), captured, PLAN)


def test_a_write_that_nobody_reads_stays() -> None:
    """Only what the pass knows to be bookkeeping goes, not every node without users."""
    build = GraphBuilder()
    x = build.input("x", 2, 8)
    build.call("add_", x, 1)
    captured = build.finish(x, facts=frozenset())
    before = print_graph(captured.graph)
    assert run(Canonicalize(), captured, PLAN).matches == 0
    assert print_graph(captured.graph) == before
    assert "add_" in [operator_name(node) for node in captured.graph.nodes]
