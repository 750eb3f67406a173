"""A LoRA path without a collective becomes one operator: it adds to the base product in place, or computes that too.

    Before:  y = linear(x, W);  h = shrink(x, A);  y2 = expand(y, h, B)          y2 is used where y was
    After:   order, segments = lora_work(x, token_slot)                once a forward: tokens grouped by slot
             y = linear(x, W);  lora_apply_(x, y, A, B, order, segments)              y is used itself
    On GPUs: y = lora_linear(x, W, bias, A, B, order, segments)
    and where a collective lies between the factors:
             h = lora_shrink_grouped(x, A, order, segments);  lora_expand_(y, collective(h), B, order, segments)

Legal where nothing else reads y: then nobody sees that it changed. The operators are Triton kernels on GPUs;
`lora_linear` has LoRA beside the product for few tokens, and is the two before it for more.
"""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, Node

from bdlora_compile.ir import Captured, Fact, Origin, fake_tensor, record, set_record
from bdlora_compile.lora_nodes import (
    ApplyArguments,
    ExpandArguments,
    ExpandInPlaceArguments,
    LinearArguments,
    ShrinkArguments,
    ShrinkGroupedArguments,
    bridge_of,
    is_expand,
    is_lookup,
    is_product_of,
    weight_and_bias,
)
from bdlora_compile.pass_manager import PassContext, erase_unused
from bdlora_compile.propagation import number_key
from bdlora_compile.regions import is_boundary
from bdlora_compile.report import PassStats, Refusal
from bdlora_compile.runtime import bridged_ops, linear_op  # noqa: F401 - registers their operators

_BRIDGED = "a collective lies between its factors"


@dataclass(frozen=True, slots=True)
class Fuse:
    """One in-place operator for each LoRA path without a collective."""

    name: ClassVar[str] = "fuse"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LORA_LOCAL, Fact.MERGED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.FUSED})

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        graph = captured.graph
        matches, refusals = 0, []
        work: dict[object, _Work] = {}
        on_gpu = context.plan.is_for_gpus
        for expand in [node for node in graph.nodes if is_expand(node)]:
            reason = _refusal(expand)
            if reason:
                refusals.append(Refusal(record(expand).site or expand.name, reason))
            if on_gpu and reason == _BRIDGED and len(ExpandArguments.of(expand).y.users) == 1:
                _share_work(graph, expand, work)
            elif not reason:
                _fuse(graph, expand, work, on_gpu)
                matches += 1
        return PassStats(matches=matches, refusals=refusals)

    def verify(self, captured: Captured, context: PassContext) -> None:
        """Nothing beyond shapes: y keeps its own."""


def _refusal(expand: Node) -> str:
    """Why a path stays two operators; empty if nothing is in the way."""
    _, bridge = bridge_of(expand)
    if bridge:
        return _BRIDGED
    y = ExpandArguments.of(expand).y
    if is_lookup(ExpandArguments.of(expand).h):
        return "its A is looked up by token id: there is nothing to multiply"
    if len(y.users) > 1:
        return "its base output is read elsewhere too"
    return ""


@dataclass(frozen=True, slots=True)
class _Work:
    """What the operators of a forward share."""

    order: Node
    segments: Node


def _fuse(graph: Graph, expand: Node, work: dict[object, _Work], on_gpu: bool) -> None:
    second = ExpandArguments.of(expand)
    first = ShrinkArguments.of(second.h)
    shared = _work_of(graph, second.h, work)
    if on_gpu and is_product_of(second.y, first.x) and _is_given(first.token_slot):
        _insert_product(graph, expand, first, second, shared)
    else:
        _insert_apply(graph, expand, first, second, shared)


def _work_of(graph: Graph, shrink: Node, work: dict[object, _Work]) -> _Work:
    """What the path of a shrink shares with the others, made where it is needed first."""
    first = ShrinkArguments.of(shrink)
    # All layers of a forward see the same tokens; a graph in which some see fewer has a grouping for each choice.
    tokens = (first.token_slot, *(number_key(size) for size in fake_tensor(first.x).shape[:-1]))
    if tokens not in work:
        before = _before_layers(graph, first.x) if _is_given(first.token_slot) else None
        work[tokens] = _insert_work(graph, first, before or shrink)
    return work[tokens]


def _is_given(token_slot: Node) -> bool:
    """Whether the forward takes the tokens' slots as they are.

    Those of some tokens alone (kept for logits) are made where they are read: there is nothing to group earlier, and
    what LoRA beside a product reads at once must not be written by the kernel ahead (`runtime/kernels/launch.py`).
    """
    return token_slot.op == "placeholder"


def _share_work(graph: Graph, expand: Node, work: dict[object, _Work]) -> None:
    """Two operators that group no tokens themselves, and of which the second adds in place."""
    shrink, _ = bridge_of(expand)
    if is_lookup(shrink):
        return
    shared = _work_of(graph, shrink, work)
    first, second = ShrinkArguments.of(shrink), ExpandArguments.of(expand)
    with graph.inserting_before(shrink):
        grouped = ShrinkGroupedArguments.taken_from(first, shared).insert(graph)
    with graph.inserting_before(expand):
        added = ExpandInPlaceArguments.taken_from(second, shared).insert(graph)
    for new, old in ((grouped, shrink), (added, expand)):
        new.meta["nn_module_stack"] = old.meta.get("nn_module_stack")
        set_record(new, origin=Origin.LORA, site=record(old).site, placement=record(old).placement, stage="fuse")
    set_record(second.y, site=record(expand).site)
    shrink.replace_all_uses_with(grouped)
    expand.replace_all_uses_with(second.y)
    erase_unused(graph, [expand, shrink])


def _insert_product(graph: Graph, expand: Node, first: ShrinkArguments, second: ExpandArguments, work: _Work) -> None:
    y, (weight, bias) = second.y, weight_and_bias(second.y)
    with graph.inserting_before(expand):
        product = LinearArguments.taken_from(first, second, work, weight=weight, bias=bias).insert(graph)
    product.meta["nn_module_stack"] = y.meta.get("nn_module_stack")
    set_record(product, placement=record(y).placement, site=record(expand).site, stage="fuse")
    expand.replace_all_uses_with(product)
    erase_unused(graph, [expand, second.h, y])


def _insert_apply(graph: Graph, expand: Node, first: ShrinkArguments, second: ExpandArguments, work: _Work) -> None:
    with graph.inserting_before(expand):
        fused = ApplyArguments.taken_from(first, second, work).insert(graph)
    fused.meta["nn_module_stack"] = expand.meta.get("nn_module_stack")
    set_record(fused, origin=Origin.LORA, site=record(expand).site, stage="fuse")
    set_record(second.y, site=record(expand).site)
    expand.replace_all_uses_with(second.y)
    erase_unused(graph, [expand, second.h])


def _before_layers(graph: Graph, x: Node) -> Node | None:
    """The first boundary between layers, if the tokens of ``x`` are those that it carries: work for all layers."""
    boundary = next(filter(is_boundary, graph.nodes), None)
    if boundary is None:
        return None
    carried, own = fake_tensor(boundary), fake_tensor(x)
    same = [number_key(size) for size in carried.shape[:-1]] == [number_key(size) for size in own.shape[:-1]]
    return boundary if same and carried.dtype == own.dtype else None


def _insert_work(graph: Graph, first: ShrinkArguments, before: Node) -> _Work:
    x = before.args[0] if is_boundary(before) else first.x
    with graph.inserting_before(before):
        pair = graph.call_function(torch.ops.bdlora.lora_work.default, (x, first.token_slot))
        order, segments = (graph.call_function(operator.getitem, (pair, index)) for index in (0, 1))
    for node in (pair, order, segments):
        node.meta["nn_module_stack"] = None if is_boundary(before) else before.meta.get("nn_module_stack")
        set_record(node, origin=Origin.LORA, stage="fuse")
    return _Work(order, segments)
