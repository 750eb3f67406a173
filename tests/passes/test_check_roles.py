"""Check roles: a plan that contradicts what feeds what is named by its layer; the graph stays as it is."""

from dataclasses import replace

import pytest
import torch

from bdlora_compile.errors import PlacementError
from bdlora_compile.ir import Captured
from bdlora_compile.pass_manager import PassContext
from bdlora_compile.passes.check_roles import CheckRoles
from bdlora_compile.passes.deduplicate import Deduplicate
from bdlora_compile.plan import ModelPlan
from bdlora_compile.printer import print_graph
from bdlora_compile.sites import Role, Site
from tests.conftest import GoldenCheck
from tests.passes.graphs import GraphBuilder, plan_of, require_unchanged, run


def sites_of(number: int) -> tuple[Site, Site]:
    layer = f"model.layers.{number}.mlp"
    return Site(f"{layer}.up_proj", Role.COLUMN, 8, 12), Site(f"{layer}.down_proj", Role.ROW, 12, 8)


PLAN = plan_of(2, (*sites_of(0), *sites_of(1)))


def decoder() -> Captured:
    """Two layers x + down(relu(up(sin(x)))), one of them kept."""
    build = GraphBuilder()
    x = build.input("x", 2, 3, 8)
    weights = [
        (build.weight(f"{up.name}.weight", 12, 8), build.weight(f"{down.name}.weight", 8, 12))
        for up, down in map(sites_of, range(2))
    ]
    hidden = build.call(torch.cos, x)
    for number, (up, down) in enumerate(weights):
        build.layer = f"model.layers.{number}"
        first, last = sites_of(number)
        inner = build.call(torch.relu, build.linear(build.call(torch.sin, hidden), up, site=first.name))
        hidden = build.call(torch.add, hidden, build.linear(inner, down, site=last.name))
    build.layer = ""
    captured = build.finish(build.call(torch.tanh, hidden))
    run(Deduplicate(), captured, PLAN)
    return captured


def with_role(plan: ModelPlan, name: str, role: Role) -> ModelPlan:
    return replace(plan, sites={**plan.sites, name: replace(plan.sites[name], role=role)})


def test_roles_that_agree(golden: GoldenCheck) -> None:
    """Both sites of the layer that is kept; a second look finds the same and changes nothing either."""
    captured = decoder()
    golden("check_roles", print_graph(captured.graph))
    for _ in range(2):
        stats = require_unchanged(CheckRoles(), captured, PLAN)
        assert (stats.matches, list(stats.refusals)) == (2, [])


def test_a_contradiction_is_an_error_that_names_the_layer(golden: GoldenCheck) -> None:
    captured = decoder()
    before = print_graph(captured.graph)
    up, _ = sites_of(0)
    with pytest.raises(PlacementError) as caught:
        run(CheckRoles(), captured, with_role(PLAN, up.name, Role.ROW))
    golden("error_roles", str(caught.value) + "\n")
    assert print_graph(captured.graph) == before


def test_a_contradiction_is_reported_when_not_strict() -> None:
    _, down = sites_of(0)
    captured = decoder()
    stats = CheckRoles().rewrite(captured, PassContext(with_role(PLAN, down.name, Role.COLUMN), strict=False))
    assert stats.matches == 1
    assert [(left.where, left.reason) for left in stats.refusals] == [
        (down.name, "the plan has it as a column layer; in the graph it is a row layer")
    ]


def test_layers_without_sites_are_not_looked_at() -> None:
    """The twin: a graph that is not cut into layers, and linear layers that no adapter changes."""
    build = GraphBuilder()
    x, up = build.input("x", 2, 3, 8), build.weight(f"{sites_of(0)[0].name}.weight", 12, 8)
    whole = build.finish(build.linear(x, up, site=sites_of(0)[0].name))
    assert require_unchanged(CheckRoles(), whole, PLAN).matches == 0
    captured = decoder()
    for node in captured.graph.nodes:
        node.meta.pop("bdlora", None)
    assert require_unchanged(CheckRoles(), captured, PLAN).matches == 0
