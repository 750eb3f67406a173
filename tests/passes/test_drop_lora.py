"""The graph of a batch in which no row has an adapter."""

import pytest
import torch

from bdlora_compile.collectives import is_collective
from bdlora_compile.errors import PassError
from bdlora_compile.factors import Layout
from bdlora_compile.ir import Captured, Origin, record, set_record
from bdlora_compile.passes.drop_lora import DropLora
from bdlora_compile.passes.fuse import Fuse
from bdlora_compile.passes.localize import LocalizeLora
from bdlora_compile.passes.merge import Merge
from bdlora_compile.passes.partition import Partition
from bdlora_compile.placement import Shard
from bdlora_compile.plan import ModelPlan
from bdlora_compile.printer import print_graph
from tests.conftest import GoldenCheck
from tests.passes.graphs import GraphBuilder, plan_of, require_idempotent, run
from tests.passes.test_lora_passes import DOWN, UP, column_and_row


def finished(plan: ModelPlan) -> Captured:
    captured = column_and_row()
    for graph_pass in (Partition(), LocalizeLora(), Merge(), Fuse()):
        run(graph_pass, captured, plan, strict=False)
    return captured


@pytest.mark.parametrize("layout", Layout)
def test_no_lora_node_is_left(golden: GoldenCheck, layout: Layout) -> None:
    """Both layouts end in the same graph: the base model's, with its one collective."""
    plan = plan_of(2, (UP, DOWN), layout)
    captured = finished(plan)
    original = print_graph(captured.graph)
    dropped = captured.copy()
    assert run(DropLora(), dropped, plan).matches == 2
    golden("drop_lora_column_and_row", print_graph(dropped.graph))
    assert sum(is_collective(node) for node in dropped.graph.nodes) == 1
    assert print_graph(captured.graph) == original
    require_idempotent(DropLora(), dropped, plan)


def test_a_lora_value_that_the_base_reads_is_an_error() -> None:
    """Dropping it would change the base model's result."""
    build = GraphBuilder()
    lora = build.call(torch.relu, build.input("x", 2, 8))
    captured = build.finish(build.call(torch.sin, lora))
    set_record(lora, origin=Origin.LORA)
    assert record(lora).origin is Origin.LORA
    with pytest.raises(PassError, match="a LoRA node that the base model's graph reads"):
        run(DropLora(), captured, plan_of(1))


def test_a_graph_without_lora_stays() -> None:
    """The twin: a model without sites, with the base model's own collective."""
    plan = plan_of(2, (), weights={f"{UP.name}.weight": Shard(0, 2), f"{DOWN.name}.weight": Shard(1, 2)})
    captured = column_and_row()
    for node in captured.graph.nodes:
        set_record(node, site=None)
    run(Partition(), captured, plan)
    assert sum(is_collective(node) for node in captured.graph.nodes) == 1
    require_idempotent(DropLora(), captured, plan)
