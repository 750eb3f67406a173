"""S-LoRA's exchanges between the ranks run beside the base product that reads the same operand."""

from dataclasses import replace

import pytest
import torch
from torch.fx import Node

from bdlora_compile.exchanges_beside import put_exchanges_beside
from bdlora_compile.factors import Layout
from bdlora_compile.ir import Captured, placeholders, record, stage_nodes
from bdlora_compile.passes.fuse import Fuse
from bdlora_compile.placement import Mesh
from bdlora_compile.printer import print_graph
from bdlora_compile.propagation import propagate
from bdlora_compile.runtime import bridged_ops
from bdlora_compile.transport import through_symmetric_memory
from tests.conftest import GoldenCheck
from tests.passes.graphs import GraphBuilder, plan_of, run
from tests.passes.test_fuse import count, merged, on_gpu
from tests.passes.test_fused_norms import TRANSPORT
from tests.passes.test_fused_paths import DOWN, GATE, SITES, bank_of_sites, result_of

BRIDGED = "bdlora::lora_linear_bridged"


def two_products(layout: Layout = Layout.SLORA, bias: bool = False, other_operand: bool = False) -> Captured:
    """down(gate(x)) of rank 0 of two, before exchanges are put beside; ``bias`` and ``other_operand`` of gate."""
    build = GraphBuilder(torch.float32)
    x, gate = build.input("x", 2, 3, 8), build.weight(f"{GATE.name}.weight", 12, 8)
    down = build.weight(f"{DOWN.name}.weight", 8, 12)
    more = [build.weight(f"{GATE.name}.bias", 12)] if bias else []
    inner = build.linear(x, gate, *more, site=GATE.name)
    # As Dynamo has a layer without a bias.
    y = build.call(torch.nn.functional.linear, build.call(torch.sin, inner), down, None, site=DOWN.name)
    plan = replace(plan_of(2, SITES, layout), dtype=torch.float32)
    captured = merged(build.finish(y), plan)
    run(Fuse(), captured, on_gpu(plan))
    propagate(captured.graph, "sum")
    through_symmetric_memory(captured, replace(TRANSPORT, mailbox=None), Mesh(2, "group"), 0)
    propagate(captured.graph, "emit")
    if other_operand:
        product = product_of(captured)
        with captured.graph.inserting_before(product):
            product.args = (captured.graph.call_function(torch.neg, (product.args[0],)), product.args[1])
        propagate(captured.graph, "emit")
    return captured


def product_of(captured: Captured) -> Node:
    (product,) = [node for node in stage_nodes(captured.graph, "linear") if record(node).site == GATE.name]
    return product


def test_every_exchange_is_put_beside_its_product(golden: GoldenCheck) -> None:
    captured = two_products()
    stats = put_exchanges_beside(captured.graph)
    propagate(captured.graph, "emit")
    assert (stats.matches, stats.refusals) == (2, [])
    golden("exchanges_beside", print_graph(captured.graph))
    assert (count(captured, BRIDGED), count(captured, "linear")) == (2, 0)
    assert put_exchanges_beside(captured.graph).matches == 0, "a second time changes nothing"


def test_local_paths_have_none() -> None:
    captured = two_products(Layout.LOCAL)
    before = print_graph(captured.graph)
    stats = put_exchanges_beside(captured.graph)
    assert (stats.matches, stats.refusals) == (0, [])
    assert print_graph(captured.graph) == before


@pytest.mark.parametrize("reads", ["bias", "other_operand"])
def test_other_products_stay_and_say_why(reads: str) -> None:
    captured = two_products(bias=reads == "bias", other_operand=reads == "other_operand")
    stats = put_exchanges_beside(captured.graph)
    (refusal,) = stats.refusals
    assert (stats.matches, refusal.where) == (1, GATE.name)
    assert refusal.reason == "its product has a bias, or reads another operand"


def test_exchanges_by_the_process_group_stay_and_say_why() -> None:
    captured = two_products()
    for node in [*stage_nodes(captured.graph, "bdlora::all_reduce")]:
        node.target = torch.ops._c10d_functional.all_reduce.default
        node.args = (node.args[0], "sum", "group")
    stats = put_exchanges_beside(captured.graph)
    assert stats.matches == 0
    assert {refusal.where for refusal in stats.refusals} == {GATE.name, DOWN.name}
    assert "through symmetric memory" in stats.refusals[0].reason


def test_what_sees_other_tokens_says_so() -> None:
    captured = two_products()
    (token_slot,) = [node for node in placeholders(captured.graph) if node.name == "bank_token_slot"]
    with captured.graph.inserting_after(placeholders(captured.graph)[-1]):
        chosen = captured.graph.call_function(torch.clone, (token_slot,))
    chosen.meta = dict(token_slot.meta)
    token_slot.replace_all_uses_with(chosen, lambda user: user is not chosen)
    reasons = {refusal.reason for refusal in put_exchanges_beside(captured.graph).refusals}
    assert reasons == {"its tokens are chosen in the graph"}


def test_the_graph_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plain implementations, which are the same operators in the same order: not a bit may differ."""
    monkeypatch.setattr(bridged_ops, "all_reduce", lambda x, *_: x)
    before, after = two_products(), two_products()
    bank = bank_of_sites(2, torch.float32, Layout.SLORA)
    assert put_exchanges_beside(after.graph).matches == 2
    wanted = result_of(before, bank)
    assert torch.equal(result_of(after, bank), wanted)
    bank.scales.zero_()
    assert not torch.equal(result_of(after, bank), wanted), "the twin"
