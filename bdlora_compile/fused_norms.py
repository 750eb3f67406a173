"""All-reduces of a finished graph behind which a residual addition and an RMSNorm follow: one operator for all.

    Before:  s = add(residual, wait_tensor(all_reduce(x, sum, group)));  y = mul(weight, rms(s))
    After:   s, y = bdlora::all_reduce_add_norm(x, residual, weight, ...)
    Between two layers, where the sum is handed on and the norm lies in the next layer, the exchange moves there too:
    Before:  s = add(residual, wait_tensor(all_reduce(x)));  b = layer_boundary(s);  y = mul(weight, rms(b))
    After:   b, c = layer_boundary(x), layer_boundary(residual);  s, y = bdlora::all_reduce_add_norm(b, c, weight, ...)

The first layer gets an embedding, which is a sum over the ranks without a residual: zeros stand for it. All boundaries
change or none does, since alike layers are one region, whichever layer is before.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from bdlora_compile.collectives import ALL_REDUCE, WAIT
from bdlora_compile.ir import Origin, fake_tensor, is_tensor, operator_name, record, set_record, stage_nodes
from bdlora_compile.pass_manager import erase_with_operands
from bdlora_compile.regions import is_boundary, layer_boundary
from bdlora_compile.report import PassStats, Refusal
from bdlora_compile.rms_norms import Norm, norm_of
from bdlora_compile.runtime.norm_op import KINDS

Insert = Callable[[Node, Node, Node, float], Node]
"""Inserts the operator for (x, residual, weight, epsilon); a node of its two results."""

_ONLY_COUNTED = "bdlora::lora_work"
"""Reads of its first operand only how many tokens there are."""


@dataclass(frozen=True, slots=True)
class _Sum:
    """x summed over the ranks, and what it is added to; ``value`` is all of it, ``reduced`` the sum over the ranks."""

    x: Node
    residual: Node | None
    reduced: Node
    value: Node


@dataclass(frozen=True, slots=True)
class _Place:
    """A sum and the norm behind it, with the boundary that lies between them, if one does."""

    sum: _Sum
    norm: Norm
    boundary: Node | None


def fuse_norms(graph: Graph, insert: Insert) -> PassStats:
    """Rewrite all places of a graph; sums over the ranks for LoRA's sake are not looked at."""
    waits = [
        wait
        for node in stage_nodes(graph, ALL_REDUCE)
        if record(node).origin is Origin.BASE
        for wait in node.users
        if operator_name(wait) == WAIT
    ]
    found = {wait: _place(wait) for wait in waits}
    found |= _all_boundaries_or_none(graph, found)
    reasons = {wait: place for wait, place in found.items() if isinstance(place, str)}
    for wait in waits:
        # Looked at again: the one before may have given it another residual.
        if wait not in reasons and isinstance(place := _place(wait), _Place):
            _rewrite(graph, place, insert)
    refusals = [Refusal(record(wait).site or wait.name, reason) for wait, reason in reasons.items()]
    graph.lint()
    return PassStats(matches=len(waits) - len(refusals), refusals=refusals)


def _place(wait: Node) -> _Place | str:
    """What follows a sum over the ranks, or why it stays by itself."""
    if fake_tensor(wait).dtype not in KINDS:
        return f"there is no kernel for {fake_tensor(wait).dtype}"
    summed = _sum(wait)
    if isinstance(summed, str):
        return summed
    boundaries = [user for user in summed.value.users if is_boundary(user)]
    if not boundaries:
        if summed.residual is None:
            return "nothing is added to it before it is normed"
        norm = norm_of(summed.value)
        return norm if isinstance(norm, str) else _Place(summed, norm, None)
    others = [user for user in summed.value.users if user not in boundaries and operator_name(user) != _ONLY_COUNTED]
    if others or len(boundaries) > 1:
        return "what a layer hands on is read in the layer itself, too"
    norm = norm_of(boundaries[0])
    return norm if isinstance(norm, str) else _Place(summed, norm, boundaries[0])


def _sum(wait: Node) -> _Sum | str:
    (reduced,) = wait.all_input_nodes
    x = reduced.args[0]
    assert isinstance(x, Node), "the operand of a collective is a node"
    if any(is_boundary(user) for user in wait.users):
        return _Sum(x, None, wait, wait)
    users = [*wait.users]
    if len(users) != 1 or operator_name(users[0]) != "add" or users[0].kwargs or len(users[0].args) != 2:
        return "it is read otherwise than by one addition"
    residual = next((operand for operand in users[0].args if operand is not wait), None)
    if not isinstance(residual, Node) or not is_tensor(residual):
        return "what it is added to is no tensor"
    mine, other = fake_tensor(wait), fake_tensor(residual)
    if mine.shape != other.shape or mine.dtype != other.dtype:
        return "what it is added to has another shape or dtype"
    return _Sum(x, residual, wait, users[0])


def _all_boundaries_or_none(graph: Graph, found: Mapping[Node, _Place | str]) -> dict[Node, _Place | str]:
    """Reasons for the places at boundaries, if there is one that stays."""
    boundaries = [node for node in graph.nodes if is_boundary(node)]
    at = {place.boundary: wait for wait, place in found.items() if isinstance(place, _Place) and place.boundary}
    left = [node for node in boundaries if node not in at]
    if not left:
        return {}
    return {wait: f"another layer hands on what stays: {left[0].args[0]}" for wait in at.values()}


def _rewrite(graph: Graph, place: _Place, insert: Insert) -> None:
    summed, norm = place.sum, place.norm
    value = summed.value if place.boundary is None else place.boundary
    with graph.inserting_before(value):
        x, residual = summed.x, summed.residual
        if residual is None:
            residual = graph.call_function(torch.zeros_like, (x,))
            residual.meta = dict(summed.reduced.meta)
            set_record(residual, stage="emit")
        if place.boundary is not None:
            x, residual = (_handed_on(graph, node, place.boundary) for node in (x, residual))
        pair = insert(x, residual, norm.weight, norm.epsilon)
        results = [graph.call_function(operator.getitem, (pair, index)) for index in (0, 1)]
    pair.meta = {"example_value": (fake_tensor(value), fake_tensor(norm.result))}
    set_record(pair, site=record(summed.reduced).site, stage="emit")
    for new, old in zip(results, (value, norm.result), strict=True):
        new.meta = dict(old.meta)
        set_record(new, stage="emit")
        old.replace_all_uses_with(new)
    for user in list(summed.value.users):
        if operator_name(user) == _ONLY_COUNTED:
            user.replace_input_with(summed.value, summed.x)
    # The norm's own nodes go, and the first result with them if they alone read it.
    erase_with_operands(graph, norm.result)
    erase_with_operands(graph, place.boundary or summed.value)


def _handed_on(graph: Graph, node: Node, boundary: Node) -> Node:
    carried = graph.call_function(layer_boundary, (node,))
    carried.meta = dict(node.meta)
    set_record(carried, source=None, stage=record(boundary).stage)
    return carried
