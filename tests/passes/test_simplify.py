"""Simplify and split products: what they find in graphs of ATen operators, and what they must leave."""

from collections.abc import Callable

import pytest
import torch

from bdlora_compile.ir import Captured
from bdlora_compile.pass_manager import GraphPass
from bdlora_compile.passes.simplify import Simplify
from bdlora_compile.passes.split_products import SplitProducts
from bdlora_compile.printer import print_graph
from tests.passes.graphs import GraphBuilder, plan_of, require_idempotent, run

PLAN = plan_of(2)
ATEN = torch.ops.aten
Make = Callable[[], Captured]


def chain() -> Captured:
    """What functionalization leaves of ``y[:, 2:4] += d``: a view of a view, a copy, a write of what is there."""
    build = GraphBuilder()
    y, d = build.input("y", 3, 8), build.input("d", 3, 2)
    flat = build.call(ATEN.view.default, build.call(ATEN.view.default, y, [24]), [3, 8])
    added = build.call(ATEN.add.Tensor, build.call(ATEN.slice.Tensor, flat, 1, 2, 4), d)
    written = build.call(ATEN.slice_scatter.default, flat, added, 1, 2, 4)
    again = build.call(ATEN.slice.Tensor, written, 1, 2, 4)
    copied = build.call(ATEN.copy.default, build.call(ATEN.slice.Tensor, flat, 1, 2, 4), again)
    return build.finish(build.call(ATEN.slice_scatter.default, written, copied, 1, 2, 4))


def converting_copy() -> Captured:
    build = GraphBuilder()
    a, b = build.input("a", 3), build.input("b", 3, dtype=torch.float32)
    return build.finish(build.call(ATEN.copy.default, a, b))


def other_slice() -> Captured:
    build = GraphBuilder()
    y = build.input("y", 3, 8)
    moved = build.call(ATEN.slice.Tensor, y, 1, 0, 2)
    return build.finish(build.call(ATEN.slice_scatter.default, y, moved, 1, 2, 4))


def sum_and_product() -> Captured:
    build = GraphBuilder()
    c, a, b = build.input("c", 3, 8), build.input("a", 3, 4), build.input("b", 4, 8)
    node = build.call(ATEN.addmm.default, c, a, b)
    node.kwargs = {"beta": 0.5, "alpha": 2.0}
    return build.finish(node)


def one_factor_for_all() -> Captured:
    build = GraphBuilder()
    a, w = build.input("a", 2, 3, 4), build.input("w", 4, 8)
    return build.finish(build.call(ATEN.bmm.default, a, build.call(ATEN.expand.default, w, [2, 4, 8])))


def factor_first() -> Captured:
    build = GraphBuilder()
    b, w = build.input("b", 2, 4, 3), build.input("w", 8, 4)
    return build.finish(build.call(ATEN.bmm.default, build.call(ATEN.expand.default, w, [2, 8, 4]), b))


def products_apart() -> Captured:
    build = GraphBuilder()
    return build.finish(build.call(ATEN.bmm.default, build.input("a", 2, 3, 4), build.input("b", 2, 4, 8)))


FOUND: dict[str, tuple[GraphPass, Make, int]] = {
    "chain": (Simplify(), chain, 4),
    "sum and product": (SplitProducts(), sum_and_product, 1),
    "one factor for all": (SplitProducts(), one_factor_for_all, 1),
    "factor first": (SplitProducts(), factor_first, 1),
}

LEFT: dict[str, tuple[GraphPass, Make]] = {
    "a copy that converts": (Simplify(), converting_copy),
    "a write of another slice": (Simplify(), other_slice),
    "products of their own": (SplitProducts(), products_apart),
}


def results(captured: Captured) -> torch.Tensor:
    torch.manual_seed(0)
    inputs = [
        torch.randn(node.meta["example_value"].shape, dtype=torch.float64)
        for node in captured.graph.find_nodes(op="placeholder")
    ]
    (result,) = torch.fx.GraphModule(captured.module, captured.graph)(*inputs)
    return torch.as_tensor(result)


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found_computes_the_same(name: str) -> None:
    """float64: 1e-12 is far above rounding."""
    graph_pass, make, matches = FOUND[name]
    expected, captured = results(make()), make()
    assert run(graph_pass, captured, PLAN).matches >= matches
    assert torch.allclose(results(captured), expected, atol=1e-12)
    require_idempotent(graph_pass, captured, PLAN)


@pytest.mark.parametrize("name", LEFT)
def test_what_must_be_left_is_left(name: str) -> None:
    graph_pass, make = LEFT[name]
    captured = make()
    before = print_graph(captured.graph)
    assert run(graph_pass, captured, PLAN).matches == 0
    assert print_graph(captured.graph) == before
