"""The runner: what a pass requires is there, what it leaves is verified, and errors name the pass."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from bdlora_compile.errors import PassError
from bdlora_compile.ir import Captured, Fact, operator_name
from bdlora_compile.pass_manager import PassContext, run_passes
from bdlora_compile.passes.localize import LocalizeLora
from bdlora_compile.report import PassStats, Report
from tests.passes.graphs import GraphBuilder, plan_of

CONTEXT = PassContext(plan_of(1), strict=True)


@dataclass(frozen=True, slots=True)
class Breaks:
    """A pass that leaves shapes that do not fit."""

    name: ClassVar[str] = "breaks"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.MERGED})

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        for node in captured.graph.nodes:
            if operator_name(node) == "view":
                node.args = (node.args[0], 3, 5)
        return PassStats(matches=1)

    def verify(self, captured: Captured, context: PassContext) -> None:
        """Nothing."""


def small() -> Captured:
    build = GraphBuilder()
    return build.finish(build.call("view", build.call(torch.relu, build.input("x", 2, 8)), 16), facts=frozenset())


def test_a_missing_requirement_names_the_pass_and_the_fact() -> None:
    report = Report("Hand", 1, [])
    with pytest.raises(PassError, match="pass localize: found a graph without partitioned, tagged"):
        run_passes([LocalizeLora()], small(), CONTEXT, report.stages)
    assert report.stages == []


def test_shapes_that_do_not_fit_name_the_node_and_the_pass() -> None:
    captured = small()
    with pytest.raises(PassError, match=r"node view \(view\) after pass breaks"):
        run_passes([Breaks()], captured, CONTEXT, [])
    assert Fact.MERGED not in captured.facts
