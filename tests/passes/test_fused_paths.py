"""Parts of LoRA paths that the kernels beside their product do: norms behind sums, and activations."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Interpreter, Node

from bdlora_compile.factors import LocalFactors, LocalShape
from bdlora_compile.fused_paths import fuse_paths
from bdlora_compile.ir import BankSource, Captured, RankIndices, fake_tensor, placeholders, record, stage_nodes
from bdlora_compile.passes.fuse import Fuse
from bdlora_compile.placement import Mesh
from bdlora_compile.printer import print_graph
from bdlora_compile.propagation import propagate
from bdlora_compile.report import Refusal
from bdlora_compile.runtime import norm_op
from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.sites import Role, Site
from bdlora_compile.transport import through_symmetric_memory
from tests.conftest import GoldenCheck
from tests.passes.graphs import GraphBuilder, plan_of, run
from tests.passes.test_fuse import count, merged, on_gpu
from tests.passes.test_fused_norms import TRANSPORT, norm_of_rows

LAYER = "model.layers.0"
OUT = Site(f"{LAYER}.self_attn.o_proj", Role.ROW, 8, 8)
GATE, UP = (Site(f"{LAYER}.mlp.{name}", Role.COLUMN, 8, 12) for name in ("gate_proj", "up_proj"))
DOWN = Site(f"{LAYER}.mlp.down_proj", Role.ROW, 12, 8)
SITES = (OUT, GATE, UP, DOWN)
NOTHING = "the kernel ahead and the one behind have no part of it"
Activation = Callable[[GraphBuilder, Node, Node], Node]


def silu_times(build: GraphBuilder, gate: Node, up: Node) -> Node:
    return build.call(torch.mul, build.call(torch.nn.functional.silu, gate), up)


def half_a_layer(ranks: int, activation: Activation = silu_times, dtype: torch.dtype = torch.float32) -> Captured:
    """residual + o(sin(x)), its norm, and an MLP, through all passes and on symmetric memory where there are ranks."""
    build = GraphBuilder(dtype)
    x, residual, scale = build.input("x", 2, 3, 8), build.input("residual", 2, 3, 8), build.input("scale", 8)
    out, gate, up, down = (build.weight(f"{site.name}.weight", site.out_features, site.in_features) for site in SITES)
    attended = build.linear(build.call(torch.sin, x), out, site=OUT.name)
    normed = norm_of_rows(build, build.call(torch.add, residual, attended), scale)["result"]
    inner = activation(build, build.linear(normed, gate, site=GATE.name), build.linear(normed, up, site=UP.name))
    plan = replace(plan_of(ranks, SITES), dtype=dtype)
    captured = merged(build.finish(build.linear(inner, down, site=DOWN.name)), plan)
    run(Fuse(), captured, on_gpu(plan))
    through_symmetric_memory(captured, TRANSPORT, Mesh(ranks, "group"), 0)
    propagate(captured.graph, "emit")
    return captured


def test_norms_and_activations_do_parts_of_lora(golden: GoldenCheck) -> None:
    """The norm does the LoRA of o; the activation A of down, and, where it is faster, B of gate and up."""
    captured = half_a_layer(2)
    stats = fuse_paths(captured)
    propagate(captured.graph, "emit")
    assert (stats.matches, stats.refusals) == (3, [])
    golden("fused_paths", print_graph(captured.graph))
    assert not count(captured, "silu")
    assert fuse_paths(captured).matches == 0, "a second time changes nothing"


def test_without_a_sum_of_ranks_the_activation_alone_does() -> None:
    captured = half_a_layer(1)
    stats = fuse_paths(captured)
    assert (stats.matches, stats.refusals) == (2, [Refusal(OUT.name, NOTHING)])
    assert count(captured, "bdlora::lora_linear_swiglu") == 1


def swapped(build: GraphBuilder, gate: Node, up: Node) -> Node:
    return silu_times(build, up, gate)


def relu_times(build: GraphBuilder, gate: Node, up: Node) -> Node:
    return build.call(torch.mul, build.call(torch.relu, gate), up)


def read_twice(build: GraphBuilder, gate: Node, up: Node) -> Node:
    return build.call(torch.add, silu_times(build, gate, up), up)


def of_the_same(build: GraphBuilder, gate: Node, up: Node) -> Node:
    build.call(torch.sin, gate)
    return build.call(torch.mul, build.call(torch.nn.functional.silu, up), up)


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (swapped, "gate and up are no halves of one product with LoRA"),
        (relu_times, NOTHING),
        (read_twice, NOTHING),
        (of_the_same, "what lies between gate, up and it is read elsewhere too"),
    ],
)
def test_other_activations_stay_and_say_why(activation: Activation, reason: str) -> None:
    captured = half_a_layer(1, activation)
    before = print_graph(captured.graph)
    stats = fuse_paths(captured)
    assert stats.matches == 0
    assert {refusal.where: refusal.reason for refusal in stats.refusals}[DOWN.name] == reason
    assert print_graph(captured.graph) == before


def bank_of_sites(ranks: int, dtype: torch.dtype) -> AdapterBank:
    """A rank's part of two adapters of local ranks 2 and 4 for all sites."""
    bank = AdapterBank([site.name for site in SITES], 2, 4096, 6, dtype, torch.device("cpu"))
    for slot, rank in enumerate((2, 4)):
        factors = {}
        for site in SITES:
            cuts = (1, ranks) if site.role is Role.COLUMN else (ranks, 1)
            sizes = (site.in_features // cuts[0], site.out_features // cuts[1])
            a, b = (torch.randn(rank, size).to(dtype) for size in sizes)
            factors[site.name] = (LocalFactors(LocalShape(rank, rank, 1, 1, *sizes), a, b), 0.5)
        bank.write(slot, bank.stage(factors), bank.used_elements())
    bank.token_slot.copy_(torch.tensor([0, 1, -1, 1, 0, 0]))
    return bank


def result_of(captured: Captured, bank: AdapterBank) -> torch.Tensor:
    """On random values, the same in each call; the last sum over the ranks is left out."""
    for node in [*stage_nodes(captured.graph, "bdlora::all_reduce")]:
        node.replace_all_uses_with(node.all_input_nodes[0])
        captured.graph.erase_node(node)
    torch.manual_seed(0)
    values: list[Any] = []
    for node in placeholders(captured.graph):
        source, like = record(node).source, fake_tensor(node)
        if isinstance(source, BankSource):
            values.append(getattr(bank, source.field.value))
        elif isinstance(source, RankIndices):
            values.append(torch.arange(like.shape[0]))
        else:
            values.append(torch.randn(like.shape).to(like.dtype))
    (result,) = Interpreter(GraphModule(captured.module, captured.graph)).run(*values)
    assert isinstance(result, torch.Tensor)
    return result.float()


@pytest.mark.parametrize(("ranks", "dtype"), [(1, torch.float32), (2, torch.float32), (2, torch.bfloat16)])
def test_the_graph_computes_the_same(ranks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the operators' plain implementations, each rank's sums its own; LoRA is deferred with bfloat16 alone.

    The same sums in the same order: equal but for where they are rounded, once or twice a value.
    """
    monkeypatch.setattr(norm_op, "all_reduce", lambda x, *_: x)
    tolerance = 4 * torch.finfo(dtype).eps
    before, after = half_a_layer(ranks, dtype=dtype), half_a_layer(ranks, dtype=dtype)
    bank = bank_of_sites(ranks, dtype)
    assert fuse_paths(after).matches == (2 if ranks == 1 else 3)
    wanted = result_of(before, bank)
    assert (result_of(after, bank) - wanted).abs().max() < tolerance * wanted.abs().max()
    bank.scales[0] = 0.0
    assert not (result_of(after, bank) - wanted).abs().max() < 10 * tolerance * wanted.abs().max(), "the twin: no o"
