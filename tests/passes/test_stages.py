"""One small graph of each kind through all passes: the text after each, what it matched, and what it left and why.

Every pass runs a second time here and may change nothing then.
"""

import operator
from collections.abc import Callable, Mapping

import pytest
import torch
from torch.fx import Node

from bdlora_compile.factors import Layout, read_local
from bdlora_compile.ir import Captured
from bdlora_compile.pipeline import BASE_ONLY, PIPELINE
from bdlora_compile.placement import Shard
from bdlora_compile.plan import ModelPlan
from bdlora_compile.printer import print_graph
from bdlora_compile.report import PassStats
from bdlora_compile.runtime.adapter_file import FactorKind, LoraFactors
from bdlora_compile.runtime.adapter_tensors import MemoryTensor
from bdlora_compile.runtime.attention import attention as attend_rows
from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.runtime.ops import SlotField
from bdlora_compile.sites import Role, Site
from tests.conftest import GoldenCheck
from tests.passes.graphs import GraphBuilder, plan_of, require_unchanged, run

LAYER = "model.layers.0"
UP = Site(f"{LAYER}.mlp.up_proj", Role.COLUMN, 8, 12)
GATE = Site(f"{LAYER}.mlp.gate_proj", Role.COLUMN, 8, 12)
DOWN = Site(f"{LAYER}.mlp.down_proj", Role.ROW, 12, 8)
QUERY = Site(f"{LAYER}.self_attn.q_proj", Role.COLUMN, 8, 16, unit=4)
KEY = Site(f"{LAYER}.self_attn.k_proj", Role.COLUMN, 8, 8, unit=4)
VALUE = Site(f"{LAYER}.self_attn.v_proj", Role.COLUMN, 8, 8, unit=4)
OUT = Site(f"{LAYER}.self_attn.o_proj", Role.ROW, 16, 8, unit=4)
TABLE = "model.embed_tokens.weight"
EMBEDDING = Site("model.embed_tokens", Role.ROW, 11, 8, vocabulary=True)
HEAD = Site("lm_head", Role.COLUMN, 8, 11, vocabulary=True, tied_weight=TABLE)

DOWN_CUT = {f"{DOWN.name}.weight": Shard(1, 2)}
UP_CUT = {f"{UP.name}.weight": Shard(0, 2)}


def mlp() -> Captured:
    """down(relu(up(x))), as Dynamo leaves it: nothing is known of it yet."""
    build = GraphBuilder()
    x = build.input("x", 2, 3, 8)
    up, down = build.weight(f"{UP.name}.weight", 12, 8), build.weight(f"{DOWN.name}.weight", 8, 12)
    build.layer = f"{LAYER}.mlp"
    inner = build.call(torch.relu, build.linear(x, up))
    return build.finish(build.linear(inner, down), facts=frozenset())


def gated_mlp() -> Captured:
    """down(relu(gate(x)) * up(x))."""
    build = GraphBuilder()
    x = build.input("x", 2, 3, 8)
    gate, up = (build.weight(f"{site.name}.weight", 12, 8) for site in (GATE, UP))
    down = build.weight(f"{DOWN.name}.weight", 8, 12)
    build.layer = f"{LAYER}.mlp"
    inner = build.call(torch.mul, build.call(torch.relu, build.linear(x, gate)), build.linear(x, up))
    return build.finish(build.linear(inner, down), facts=frozenset())


def attention() -> Captured:
    """Four query heads and two key/value heads of four features."""
    build = GraphBuilder()
    x, rows = build.input("x", 2, 3, 8), build.input("rows", 3, 3, dtype=torch.int32)
    weights = [build.weight(f"{site.name}.weight", site.out_features, 8) for site in (QUERY, KEY, VALUE)]
    out = build.weight(f"{OUT.name}.weight", 8, 16)
    build.layer = f"{LAYER}.self_attn"

    def heads(weight: Node, count: int) -> Node:
        return build.call("transpose", build.call("view", build.linear(x, weight), 2, 3, count, 4), 1, 2)

    query, key, value = (heads(weight, count) for weight, count in zip(weights, (4, 2, 2), strict=True))
    attended = build.call(attend_rows._opoverload, query, key, value, rows, 0.5)
    joined = build.call("reshape", attended, 2, 3, -1)
    return build.finish(build.linear(joined, out), facts=frozenset())


def tied_vocabulary() -> Captured:
    """An embedding and the logits of each row's last token, with one weight of 11 rows."""
    build = GraphBuilder()
    ids = build.input("ids", 2, 3, dtype=torch.int64)
    table = build.weight(TABLE, 11, 8)
    hidden = build.call(torch.relu, build.call(torch.nn.functional.embedding, ids, table))
    last = build.call(operator.getitem, hidden, (slice(None), slice(-1, None), slice(None)))
    return build.finish(build.linear(last, table), facts=frozenset())


Make = Callable[[], Captured]
CASES: Mapping[str, tuple[Make, ModelPlan]] = {
    "column": (mlp, plan_of(2, (UP,), weights=DOWN_CUT)),
    "row": (mlp, plan_of(2, (DOWN,), weights=UP_CUT)),
    "fewer_kv_heads": (attention, plan_of(4, (QUERY, KEY, VALUE, OUT))),
    "fewer_kv_heads_slora": (attention, plan_of(4, (QUERY, KEY, VALUE, OUT), Layout.SLORA)),
    "mixed": (gated_mlp, plan_of(2, (GATE, UP, DOWN), layouts={GATE.name: Layout.SLORA})),
    "refused": (mlp, plan_of(2, (UP, DOWN), Layout.SLORA)),
    "vocabulary": (tied_vocabulary, plan_of(2, (EMBEDDING, HEAD), gathered=frozenset([TABLE]))),
    "vocabulary_slora": (tied_vocabulary, plan_of(2, (EMBEDDING, HEAD), Layout.SLORA, gathered=frozenset([TABLE]))),
}
"""``mixed``: sites of both layouts, and a bank of adapters of every kind, whose table is below. ``refused``: no site is
localized, and the passes say why."""


@pytest.mark.parametrize("name", CASES)
def test_every_stage(name: str, golden: GoldenCheck) -> None:
    make, plan = CASES[name]
    captured = make()
    text = f"captured\n{print_graph(captured.graph)}"
    for graph_pass in (*PIPELINE, *BASE_ONLY):
        before = print_graph(captured.graph)
        stats = run(graph_pass, captured, plan)
        text += _stage(graph_pass.name, stats, before, print_graph(captured.graph))
        again = require_unchanged(graph_pass, captured, plan)
        assert again.matches == 0
    golden(f"stages_{name}", text)


def _stage(name: str, stats: PassStats, before: str, after: str) -> str:
    left = "".join(f"left {refusal.where}: {refusal.reason}\n" for refusal in stats.refusals)
    graph = after if after != before else "(as before)\n"
    return f"\nafter {name}, {stats.matches} matches\n{left}{graph}"


ADAPTERS = {"two blocks": (4, 2), "four blocks": (4, 4), "ordinary": (3, 1)}
"""(rank, blocks)."""


def _factors(site: Site, rank: int, blocks: int) -> LoraFactors:
    """An adapter at one site, its blocks on the dim that tensor parallelism splits."""
    is_column, generator = site.role is Role.COLUMN, torch.Generator().manual_seed(0)
    a = torch.randn(rank, site.in_features // (1 if is_column else blocks), generator=generator)
    b = torch.randn(site.out_features, rank // (blocks if is_column else 1), generator=generator)
    kind = (FactorKind.BLOCK_B if is_column else FactorKind.BLOCK_A) if blocks > 1 else FactorKind.DENSE
    return LoraFactors(site.name, kind, rank, blocks, 0.5, MemoryTensor("a", a, "hand"), MemoryTensor("b", b, "hand"))


def test_mixed_bank(golden: GoldenCheck) -> None:
    """What the ``mixed`` graph's operators find on each rank: adapters of every kind, sites of both layouts."""
    _, plan = CASES["mixed"]
    lines = []
    for rank in range(plan.mesh.size):
        bank = AdapterBank(list(plan.sites), len(ADAPTERS), 2000, 8, torch.float32, torch.device("cpu"))
        for slot, (width, blocks) in enumerate(ADAPTERS.values()):
            found = {name: _factors(site, width, blocks) for name, site in plan.sites.items()}
            local = {
                name: (read_local(factors, plan.sites[name], plan.layouts[name], rank, plan.mesh), factors.scaling)
                for name, factors in found.items()
            }
            bank.write(slot, bank.stage(local), bank.used_elements())
        for row, name in enumerate(plan.sites):
            for slot, adapter in enumerate(ADAPTERS):
                fields = zip(SlotField, bank.slots[row, slot].tolist(), strict=True)
                text = ", ".join(f"{field.name.lower()} {value}" for field, value in fields)
                lines.append(f"rank {rank}, {name.rpartition('.')[2]} {plan.layouts[name].value}, {adapter}: {text}")
    golden("mixed_bank", "\n".join(lines) + "\n")
