"""Tag: what the plan names is marked, by operator and weight; nothing else is."""

from typing import Any

import pytest
import torch

from bdlora_compile.errors import PassError
from bdlora_compile.ir import Captured, InputSource, WeightSource, operator_name, placeholders, record, set_record
from bdlora_compile.passes.tag import Tag
from bdlora_compile.printer import print_graph
from bdlora_compile.sites import Role, Site
from tests.conftest import GoldenCheck
from tests.passes.graphs import GraphBuilder, plan_of, require_idempotent, run

UP = Site("model.layers.0.mlp.up_proj", Role.COLUMN, 8, 12)
TABLE = "model.embed_tokens.weight"
EMBEDDING = Site("model.embed_tokens", Role.ROW, 11, 8, vocabulary=True)
HEAD = Site("lm_head", Role.COLUMN, 8, 11, vocabulary=True, tied_weight=TABLE)


def model() -> Captured:
    """An embedding, one linear layer with a bias, logits with the embedding's weight; sources not known yet."""
    build = GraphBuilder()
    ids, table = build.input("ids", 2, 3, dtype=torch.int64), build.weight(TABLE, 11, 8)
    up, bias = build.weight(f"{UP.name}.weight", 12, 8), build.weight(f"{UP.name}.bias", 12)
    down = build.weight("model.layers.0.mlp.down_proj.weight", 8, 12)
    for node in placeholders(build.graph):
        set_record(node, source=None)
    hidden = build.call(torch.nn.functional.embedding, ids, table)
    build.layer = "model.layers.0.mlp"
    inner = build.linear(hidden, up, bias)
    outer = build.linear(inner, down)
    build.layer = ""
    return build.finish(build.linear(outer, table), facts=frozenset())


def marked(captured: Captured) -> dict[str, Any]:
    """Operator of each marked node, by site."""
    return {site: operator_name(node) for node in captured.graph.nodes if (site := record(node).site)}


def test_sources_and_sites_are_written(golden: GoldenCheck) -> None:
    captured, plan = model(), plan_of(1, (EMBEDDING, UP, HEAD))
    assert run(Tag(), captured, plan).matches == 3
    golden("tag_tied_vocabulary", print_graph(captured.graph))
    assert marked(captured) == {EMBEDDING.name: "embedding", UP.name: "linear", HEAD.name: "linear"}
    sources = [record(node).source for node in placeholders(captured.graph)]
    assert [type(source) for source in sources] == [InputSource, *[WeightSource] * 4]
    assert captured.token_input is placeholders(captured.graph)[0]
    require_idempotent(Tag(), captured, plan)


def test_layers_that_the_plan_does_not_name_are_not_marked() -> None:
    """The twin: the same layers without a site, and a product with a weight that is computed."""
    captured, plan = model(), plan_of(1)
    assert run(Tag(), captured, plan).matches == 0
    assert marked(captured) == {}
    build = GraphBuilder()
    x, up = build.input("x", 2, 3, 8), build.weight(f"{UP.name}.weight", 12, 8)
    doubled = build.call(torch.mul, up, 2)
    captured = build.finish(build.linear(x, doubled), facts=frozenset())
    stats = run(Tag(), captured, plan_of(1, (UP,)))
    assert (stats.matches, marked(captured)) == (0, {})
    assert [(left.where, left.reason) for left in stats.refusals] == [(UP.name, "this graph has no layer of that name")]


def test_a_tied_weight_marks_one_operator_where_one_site_is_there() -> None:
    """The head has the embedding's weight: its product is not the embedding's site, nor the other way round."""
    for site, operator in ((EMBEDDING, "embedding"), (HEAD, "linear")):
        captured = model()
        run(Tag(), captured, plan_of(1, (site,)))
        assert marked(captured) == {site.name: operator}


def test_whole_layers_are_reported_on_several_ranks() -> None:
    captured = model()
    stats = run(Tag(), captured, plan_of(2, (UP,)))
    assert [left.where for left in stats.refusals] == ["model.layers.0.mlp.down_proj.weight"]
    assert "every rank holds it whole" in stats.refusals[0].reason


def test_a_graph_without_tokens_is_an_error(golden: GoldenCheck) -> None:
    build = GraphBuilder()
    captured = build.finish(build.call(torch.relu, build.input("x", 2, 8)), facts=frozenset())
    with pytest.raises(PassError) as caught:
        run(Tag(), captured, plan_of(1))
    golden("error_no_tokens", str(caught.value) + "\n")
