"""Rotations and the write to the cache become one operator."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Interpreter, Node

from bdlora_compile.fused_rotary import fuse_rotary
from bdlora_compile.ir import CacheSource, Captured, fake_tensor, set_record, stage_nodes
from bdlora_compile.mutation import mutated_arguments
from bdlora_compile.printer import print_graph
from bdlora_compile.propagation import propagate
from bdlora_compile.report import PassStats, Refusal, Report
from bdlora_compile.runtime import cache_ops  # noqa: F401 - registers its operator
from bdlora_compile.runtime.attention import row_table
from tests.conftest import GoldenCheck
from tests.passes.graphs import GraphBuilder
from tests.passes.test_fuse import count

HEADS, KV_HEADS, DIM, ROOM = 4, 2, 8, 9
BATCH, SEQ = 2, 3
FUSED = "bdlora::rotate_and_cache"


@dataclass
class Layer:
    """The half of a layer up to attention; nodes by what they are. ``angles`` has rows of cos and sin."""

    angles: int = 1
    angle_dim: int = DIM
    nodes: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.build = GraphBuilder()

    def rotated(self, name: str, heads: Node) -> Node:
        """As transformers writes it."""
        build, half = self.build, DIM // 2
        straight = build.call(torch.mul, heads, self.nodes["cos of heads"])
        low = build.call(operator.getitem, heads, (Ellipsis, slice(None, half, None)))
        high = build.call(operator.getitem, heads, (Ellipsis, slice(half, None, None)))
        turned = build.call(torch.cat, (build.call(torch.neg, high), low))
        turned.kwargs = {"dim": -1}
        across = build.call(torch.mul, turned, self.nodes["sin of heads"])
        result = build.call(torch.add, straight, across)
        parts = {"low": low, "high": high, "turned": turned, "straight": straight, "across": across, "rotated": result}
        self.nodes |= {f"{name} {part}": node for part, node in parts.items()}
        return result

    def heads(self, name: str, start: int, heads: int) -> Node:
        columns = self.build.call("narrow", self.nodes["y"], -1, start * DIM, heads * DIM)
        rows = self.build.call("reshape", columns, (BATCH, SEQ, -1, DIM))
        self.nodes[f"{name} columns"] = columns
        self.nodes[name] = self.build.call("transpose", rows, 1, 2)
        return self.nodes[name]

    def finish(self) -> Captured:
        build, nodes = self.build, self.nodes
        x, weight = build.input("x", BATCH, SEQ, 8), build.input("weight", (HEADS + 2 * KV_HEADS) * DIM, 8)
        cos, sin = (build.input(name, self.angles, SEQ, self.angle_dim) for name in ("cos", "sin"))
        keys, values = (build.input(name, BATCH, KV_HEADS, ROOM, DIM) for name in ("keys", "values"))
        lengths, rows = build.input("lengths", BATCH, dtype=torch.int64), build.input("rows", 3, 3, dtype=torch.int32)
        nodes |= {"y": build.linear(x, weight), "cos": cos, "sin": sin, "keys": keys, "values": values}
        q = self.heads("q", 0, HEADS)
        k, v = self.heads("k", HEADS, KV_HEADS), self.heads("v", HEADS + KV_HEADS, KV_HEADS)
        nodes |= {f"{name} of heads": build.call("unsqueeze", nodes[name], 1) for name in ("cos", "sin")}
        query, key = self.rotated("q", q), self.rotated("k", k)
        nodes["write"] = build.call(torch.ops.bdlora.cache_write_.default, keys, values, key, v, lengths)
        seen = [build.call("view_as", cache, cache) for cache in (keys, values)]
        nodes["attention"] = build.call(torch.ops.bdlora.attention.default, query, *seen, rows, 0.5)
        return build.finish(nodes["attention"])


def result_of(captured: Captured) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(attention, keys, values) on random values, the same in each call."""
    torch.manual_seed(0)
    lengths = torch.tensor([0, ROOM - SEQ])
    values: dict[str, Any] = {"lengths": lengths, "rows": row_table(torch.zeros_like(lengths), lengths, SEQ, ROOM)}
    for node in captured.graph.find_nodes(op="placeholder"):
        if node.name not in values:
            values[node.name] = torch.randn(fake_tensor(node).shape, dtype=torch.float64)
    names = [node.name for node in captured.graph.find_nodes(op="placeholder")]
    (out,) = Interpreter(GraphModule(captured.module, captured.graph)).run(*(values[name] for name in names))
    return out, values["keys"], values["values"]


def test_the_place_becomes_one_operator(golden: GoldenCheck) -> None:
    captured = Layer().finish()
    assert fuse_rotary(captured.graph) == PassStats(matches=1, refusals=[])
    propagate(captured.graph, "emit")
    golden("fused_rotary", print_graph(captured.graph))
    before = print_graph(captured.graph)
    assert fuse_rotary(captured.graph) == PassStats(matches=0, refusals=[]), "a second time changes nothing"
    assert print_graph(captured.graph) == before


@pytest.mark.parametrize("angles", [1, BATCH])
def test_the_graph_computes_the_same(angles: int) -> None:
    """To the bit: by the same operators."""
    before, after = Layer(angles).finish(), Layer(angles).finish()
    assert fuse_rotary(after.graph).matches == 1
    for found, wanted in zip(result_of(after), result_of(before), strict=True):
        assert torch.equal(found, wanted)
    (fused,) = stage_nodes(after.graph, FUSED)
    fused.args = (fused.args[0], fused.args[2], fused.args[1], *fused.args[3:])
    assert not torch.equal(result_of(after)[0], result_of(before)[0]), "the twin: cos for sin"


def test_the_graph_writes_to_the_same_arguments() -> None:
    captured = Layer().finish()
    before = mutated_arguments(captured)
    assert before == {4, 5}, "keys and values"
    fuse_rotary(captured.graph)
    propagate(captured.graph, "emit")
    assert mutated_arguments(captured) == before


Damage = Callable[[Layer], None]


def read_too(name: str) -> Damage:
    """The graph returns a value as well."""

    def damage(layer: Layer) -> None:
        output = layer.build.graph.output_node()
        output.args = ((*output.args[0], layer.nodes[name]),)  # type: ignore[misc]  # a tuple of nodes

    return damage


def argument(name: str, index: int, value: object) -> Damage:
    """Another argument for a node; a text is the name of a node."""

    def damage(layer: Layer) -> None:
        node = layer.nodes[name]
        node.update_arg(index, layer.nodes[value] if isinstance(value, str) else value)  # type: ignore[arg-type]

    return damage


def turned_the_other_way(layer: Layer) -> None:
    turned = layer.nodes["k turned"]
    turned.args = (tuple(reversed(turned.args[0])),)  # type: ignore[arg-type]  # two nodes


def joined_with_an_input(layer: Layer) -> None:
    turned = layer.nodes["q turned"]
    turned.args = ((turned.args[0][0], layer.nodes["cos"]),)  # type: ignore[index]  # two nodes


def inserted(behind: str, target: Any, operand: str, used_by: tuple[str, int] | None = None) -> Damage:
    """A node of one operand more, which another one reads."""

    def damage(layer: Layer) -> None:
        with layer.build.graph.inserting_after(layer.nodes[behind]):
            made = layer.build.call(target, layer.nodes[operand])
        made.meta = dict(layer.nodes[operand].meta)
        if used_by is not None:
            layer.nodes[used_by[0]].update_arg(used_by[1], made)

    return damage


def written_behind(layer: Layer) -> None:
    layer.nodes["attention"].append(layer.nodes["write"])


def without_attention(layer: Layer) -> None:
    attention = layer.nodes["attention"]
    attention.replace_all_uses_with(layer.nodes["q rotated"])
    layer.build.graph.erase_node(attention)


NO_ROTATION = "is not heads rotated as a whole"
NO_PRODUCT = "q, k and v are not all of one product, side by side"
NO_HEADS = "q, k and v are no heads of columns of a product"
ELSEWHERE = "what lies between q, k, v and attention is read elsewhere too"
NO_ATTENTION = "the cache is read otherwise than by one attention"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(argument("q low", 1, (Ellipsis, slice(None, 2, None))), f"q {NO_ROTATION}", id="partial q"),
        pytest.param(argument("k high", 1, (Ellipsis, slice(6, None, None))), f"k {NO_ROTATION}", id="partial k"),
        pytest.param(joined_with_an_input, f"q {NO_ROTATION}", id="a half is an input"),
        pytest.param(turned_the_other_way, f"k {NO_ROTATION}", id="turned the other way"),
        pytest.param(argument("k low", 0, "q"), f"k {NO_ROTATION}", id="a half of another"),
        pytest.param(argument("k straight", 1, "sin of heads"), "q and k are rotated by different angles", id="angles"),
        pytest.param(inserted("v", torch.neg, "v", ("write", 3)), NO_HEADS, id="v is something else"),
        pytest.param(inserted("y", torch.neg, "y", ("v columns", 0)), NO_PRODUCT, id="two products"),
        pytest.param(argument("k columns", 2, 0), NO_PRODUCT, id="k is of q's columns"),
        pytest.param(read_too("q rotated"), ELSEWHERE, id="q read elsewhere"),
        pytest.param(read_too("k rotated"), ELSEWHERE, id="k read elsewhere"),
        pytest.param(read_too("v"), ELSEWHERE, id="v read elsewhere"),
        pytest.param(read_too("q columns"), ELSEWHERE, id="columns read elsewhere"),
        pytest.param(read_too("keys"), NO_ATTENTION, id="keys read elsewhere"),
        pytest.param(argument("attention", 2, "keys"), NO_ATTENTION, id="keys for values"),
        pytest.param(written_behind, NO_ATTENTION, id="attention before the write"),
        pytest.param(without_attention, NO_ATTENTION, id="no attention"),
        pytest.param(
            inserted("q rotated", "neg_", "y"), "the product is written to after it was read", id="y written later"
        ),
    ],
)
def test_what_is_not_the_pattern_stays(damage: Damage, reason: str) -> None:
    """With the reason; the graph is as it was."""
    layer = Layer()
    captured = layer.finish()
    damage(layer)
    set_record(layer.nodes["keys"], source=CacheSource(4, layer=3, part=0))
    before = print_graph(captured.graph)
    stats = fuse_rotary(captured.graph)
    assert stats == PassStats(matches=0, refusals=[Refusal("cache of layer 3", reason)])
    assert print_graph(captured.graph) == before
    assert count(captured, FUSED) == 0


def test_angles_of_another_shape_stay() -> None:
    layer = Layer(angle_dim=1)
    stats = fuse_rotary(layer.finish().graph)
    assert [refusal.reason for refusal in stats.refusals] == [
        "cos or sin has another shape or dtype than heads of q and k"
    ]


def test_y_may_be_written_to_before_it_is_read() -> None:
    """As LoRA is added in place."""
    layer = Layer()
    captured = layer.finish()
    inserted("y", "neg_", "y")(layer)
    assert fuse_rotary(captured.graph).matches == 1


def test_a_report_says_it() -> None:
    report = Report("Llama", 2, [])
    assert "rotations" not in report.summary()
    report.rotary["base only"] = PassStats(1, [Refusal("cache of layer 3", NO_PRODUCT)])
    assert "rotations and write to the cache in one, base only: 1 of 2" in report.summary()
    assert f"left cache of layer 3: {NO_PRODUCT}" in report.summary()
