"""All-reduces that a residual addition and a norm follow become one operator, also over the boundary of a layer."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch.fx import Node

from bdlora_compile.factors import Layout
from bdlora_compile.ir import Captured, stage_nodes
from bdlora_compile.machine import SymmetricLimits
from bdlora_compile.placement import Mesh
from bdlora_compile.printer import print_graph
from bdlora_compile.propagation import propagate
from bdlora_compile.regions import layer_boundary
from bdlora_compile.report import PassStats
from bdlora_compile.runtime.all_reduce import AllReduce
from bdlora_compile.transport import through_symmetric_memory
from tests.conftest import GoldenCheck
from tests.passes.graphs import GraphBuilder, plan_of
from tests.passes.test_fuse import merged
from tests.passes.test_lora_passes import DOWN, UP, column_and_row

FUSED = "bdlora::all_reduce_add_norm"
TRANSPORT = AllReduce(
    "", torch.zeros(64, dtype=torch.uint8), SymmetricLimits(32, 64), torch.zeros(8, dtype=torch.int64)
)


def norm_of_rows(build: GraphBuilder, value: Node, weight: Node) -> dict[str, Node]:
    """RMSNorm as transformers writes it; its nodes by what they are, the last the "result"."""
    exact = build.call("to", value, torch.float32)
    square = build.call("pow", exact, 2)
    mean = build.call("mean", square, -1)
    mean.kwargs = {"keepdim": True}
    moved = build.call(torch.add, mean, 1e-5)
    quotient = build.call(torch.mul, exact, build.call(torch.rsqrt, moved))
    result = build.call(torch.mul, weight, build.call("to", quotient, build.dtype))
    return {"square": square, "mean": mean, "moved": moved, "exact": exact, "result": result}


@dataclass
class Layer:
    """An embedding, one layer of two halves, and a head, each behind a norm; nodes by what they are."""

    dtype: torch.dtype = torch.bfloat16
    nodes: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.build = GraphBuilder(self.dtype)

    def input(self, name: str, *shape: int) -> Node:
        return self.build.input(name, *shape)

    def reduced(self, x: Node) -> Node:
        summed = self.build.call(torch.ops._c10d_functional.all_reduce.default, x, "sum", "group")
        return self.build.call(torch.ops._c10d_functional.wait_tensor.default, summed)

    def norm(self, name: str, value: Node, weight: Node) -> Node:
        nodes = norm_of_rows(self.build, value, weight)
        self.nodes |= {f"{name} {part}": node for part, node in nodes.items()}
        return nodes["result"]

    def finish(self) -> Captured:
        build = self.build
        table = self.input("embedded", 2, 3, 8)
        scales = [self.input(name, 8) for name in ("first", "second", "last")]
        weights = [self.input(name, 8, 8) for name in ("o_proj", "down_proj", "lm_head")]
        hidden = build.call(layer_boundary, self.reduced(build.call(torch.sin, table)))
        half = build.linear(self.norm("first", hidden, scales[0]), weights[0], site="o_proj")
        hidden = build.call(torch.add, hidden, self.reduced(half))
        whole = build.linear(self.norm("second", hidden, scales[1]), weights[1])
        handed_on = build.call(torch.add, hidden, self.reduced(whole))
        self.nodes |= {"middle": hidden, "handed on": handed_on, "half": half}
        hidden = build.call(layer_boundary, handed_on)
        return build.finish(build.linear(self.norm("last", hidden, scales[2]), weights[2]))


def rewritten(captured: Captured, transport: AllReduce = TRANSPORT) -> PassStats | None:
    """What the report says; the graph's values are propagated anew."""
    stats = through_symmetric_memory(captured, transport, Mesh(2, "group"), 0)
    captured.graph.lint()
    propagate(captured.graph, "emit")
    return stats


def test_all_three_become_one_operator_each(golden: GoldenCheck) -> None:
    """The embedding's with zeros, the layer's own, and the one whose norm lies in the next layer."""
    captured = Layer().finish()
    assert rewritten(captured) == PassStats(matches=3, refusals=[])
    golden("fused_norms", print_graph(captured.graph))
    assert len([*stage_nodes(captured.graph, FUSED)]) == 3
    assert not [*stage_nodes(captured.graph, "bdlora::all_reduce")]
    assert not [*stage_nodes(captured.graph, "rsqrt")]


def test_without_a_mailbox_norms_stay_apart() -> None:
    captured = Layer().finish()
    assert rewritten(captured, AllReduce("", TRANSPORT.buffer, TRANSPORT.limits)) is None
    assert len([*stage_nodes(captured.graph, "bdlora::all_reduce")]) == 3
    assert len([*stage_nodes(captured.graph, "rsqrt")]) == 3


def test_float32_casts_nothing() -> None:
    """Its casts to float32 are there all the same."""
    captured = Layer(dtype=torch.float32).finish()
    assert rewritten(captured) == PassStats(matches=3, refusals=[])


Damage = Callable[[Layer], None]


def second_argument(name: str, value: object) -> Damage:
    """Another second argument for a node: a power, a dim."""
    return lambda layer: setattr(layer.nodes[name], "args", (layer.nodes[name].args[0], value))


def read_too(name: str) -> Damage:
    """The graph returns a value as well."""

    def damage(layer: Layer) -> None:
        output = layer.build.graph.output_node()
        output.args = ((*output.args[0], layer.nodes[name]),)  # type: ignore[misc]  # a tuple of nodes

    return damage


def moved_by_tensor(layer: Layer) -> None:
    moved = layer.nodes["second moved"]
    moved.args = (moved.args[0], moved.args[0])


AT_BOUNDARIES = "another layer hands on what stays"


@pytest.mark.parametrize(
    ("damage", "matches", "reasons"),
    [
        pytest.param(second_argument("second square", 3), 2, ["no mean of squares"], id="a cube"),
        pytest.param(second_argument("second mean", 0), 2, ["no mean of squares"], id="a mean over tokens"),
        pytest.param(moved_by_tensor, 2, ["no number added"], id="an epsilon that is no number"),
        pytest.param(read_too("second exact"), 2, ["read otherwise than by its norm"], id="float32 read elsewhere"),
        pytest.param(second_argument("last square", 3), 1, [AT_BOUNDARIES, "no mean of squares"], id="the head's norm"),
        pytest.param(
            second_argument("first square", 3), 1, ["no mean of squares", AT_BOUNDARIES], id="the layer's norm"
        ),
        pytest.param(
            read_too("handed on"), 1, [AT_BOUNDARIES, "in the layer itself"], id="what is handed on read elsewhere"
        ),
    ],
)
def test_what_is_not_the_pattern_stays(damage: Damage, matches: int, reasons: list[str]) -> None:
    """With the reason; all boundaries change or none, and what stays is still reduced."""
    layer = Layer()
    captured = layer.finish()
    damage(layer)
    stats = rewritten(captured)
    assert stats is not None
    assert stats.matches == len([*stage_nodes(captured.graph, FUSED)]) == matches
    assert len([*stage_nodes(captured.graph, "bdlora::all_reduce")]) == 3 - matches
    assert len(stats.refusals) == len(reasons)
    for refusal, reason in zip(stats.refusals, reasons, strict=True):
        assert reason in refusal.reason, refusal


def test_a_sum_that_is_read_twice_or_of_another_dtype_stays() -> None:
    layer = Layer(dtype=torch.float16)
    stats = rewritten(layer.finish())
    assert stats is not None
    assert [refusal.reason for refusal in stats.refusals] == ["there is no kernel for torch.float16"] * 3
    layer = Layer()
    captured = layer.finish()
    (wait,) = [node for node in layer.nodes["middle"].all_input_nodes if "wait" in str(node.target)]
    with captured.graph.inserting_after(layer.nodes["middle"]):
        layer.nodes["twice"] = captured.graph.call_function(torch.neg, (wait,))
    layer.nodes["twice"].meta = dict(wait.meta)
    read_too("twice")(layer)
    stats = rewritten(captured)
    assert stats is not None
    assert [refusal.reason for refusal in stats.refusals] == ["it is read otherwise than by one addition"]


def test_sums_for_the_sake_of_lora_are_not_looked_at() -> None:
    """They have no norm behind them: only the base model's sum is told of."""
    captured = merged(column_and_row(), plan_of(2, (UP, DOWN), Layout.SLORA))
    stats = through_symmetric_memory(captured, TRANSPORT, Mesh(2, "group"), 0)
    assert stats is not None
    assert [refusal.where for refusal in stats.refusals] == [DOWN.name]
    assert len([*stage_nodes(captured.graph, "bdlora::all_reduce")]) > 1
