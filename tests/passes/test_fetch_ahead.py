"""Operators whose kernels can fetch get the weight of the next product; the others say why not."""

import torch
from torch.fx import Node

from bdlora_compile.fetch_ahead import fetch_ahead
from bdlora_compile.ir import Captured
from bdlora_compile.printer import print_graph
from bdlora_compile.regions import layer_boundary
from bdlora_compile.report import PassStats, Refusal, Report
from bdlora_compile.runtime.cache_ops import cache_write_
from tests.conftest import GoldenCheck
from tests.passes.graphs import GraphBuilder

LIMIT = 1 << 20


class Layers:
    """Writes to a cache and products, in the order in which they are called."""

    def __init__(self) -> None:
        self.build = GraphBuilder()
        self.hidden = self.build.input("hidden", 2, 4, 1, 8)
        cache = [self.build.input(name, 2, 4, 6, 8) for name in ("keys", "values")]
        self.cache = (*cache, self.hidden, self.hidden, self.build.input("lengths", 2, dtype=torch.int64))
        self.weight = self.build.input("weight", 8, 8)

    def write(self) -> Node:
        return self.build.call(cache_write_._opoverload, *self.cache)

    def product(self, weight: Node | None = None) -> None:
        self.hidden = self.build.linear(self.hidden, weight or self.weight)

    def finish(self) -> Captured:
        return self.build.finish(self.hidden)


def test_the_next_product_s_weight_is_fetched(golden: GoldenCheck) -> None:
    """Whatever lies between; a weight may be fetched for one product and read by several."""
    layers = Layers()
    layers.write()
    layers.hidden = layers.build.call(torch.sin, layers.hidden)
    layers.product()
    layers.write()
    layers.product()
    captured = layers.finish()
    assert fetch_ahead(captured.graph, LIMIT) == PassStats(matches=2, refusals=[])
    golden("fetch_ahead", print_graph(captured.graph))


def test_the_others_say_why_not() -> None:
    layers = Layers()
    first, second = layers.write(), layers.write()
    layers.hidden = layers.build.call(layer_boundary, layers.hidden)
    third = layers.write()
    layers.product(layers.build.call(torch.neg, layers.weight))
    fourth = layers.write()
    captured = layers.finish()
    before = print_graph(captured.graph)
    stats = fetch_ahead(captured.graph, LIMIT)
    assert stats.matches == 0
    assert stats.refusals == [
        Refusal(first.name, "bdlora::cache_write_ comes before the next product"),
        Refusal(second.name, "the next product is another layer's"),
        Refusal(third.name, "the next product's second factor is no weight"),
        Refusal(fourth.name, "no product follows"),
    ]
    assert print_graph(captured.graph) == before
    report = Report("Model", 2, ["i64[1, 1]"], fetches={"base only": stats})
    assert "next weight fetched ahead, base only: 0 of 4" in report.summary()
    assert f"left {fourth.name}: no product follows" in report.summary()
