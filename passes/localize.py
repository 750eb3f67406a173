"""Replace S-LoRA's collectives by products of this rank's own factors, where the site's layout allows it.

Column site:  Before:  h = all_gather(shrink(x, A_k))     A_k [R/N, D];  y = expand(y, h, B_k)   B_k [O/N, R]
              After:   h = shrink(x, A_loc)               A_loc [r, D];  y = expand(y, h, B_loc) B_loc [O/N, r]
Row site:     Before:  h = all_reduce(shrink(x_k, A_k))   A_k [R, D/N];  y = expand(y, h, B_k)   B_k [O/N, R]
              After:   h = shrink(x_k, A_loc)             A_loc [r, D/N]; y = expand(y, h, B_loc) B_loc [O, r]
              y is a summand in both: the base all-reduce sums it.

Source: BD-LoRA arXiv 2510.23346; for factors without blocks by linearity, one of the two being replicated by choice.
Legend: D/O in/out features, R adapter rank, N tensor-parallel degree, r local rank (see `factors.py`).

Legal because of how the factors are stored: a site whose layout is local holds local factors for every adapter. A site
whose layout is slora is left, and the report says so. Never a matter of a name, nor of what the weights happen to be.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, Node

from bdlora_compile.collectives import ALL_GATHER, ALL_REDUCE, WAIT
from bdlora_compile.errors import PassError
from bdlora_compile.factors import Layout, local_features, rank_capacity
from bdlora_compile.ir import Captured, Fact, operator_name, record, stage_nodes
from bdlora_compile.pass_manager import PassContext, erase_unused
from bdlora_compile.plan import ModelPlan
from bdlora_compile.report import PassStats, Refusal

_BRIDGE = frozenset({ALL_GATHER, ALL_REDUCE, WAIT, "chunk", "getitem", "cat"})
"""What may lie between the factors: communication, and moving what it brought."""

_SHRINK, _EXPAND = "bdlora::lora_shrink", "bdlora::lora_expand"
_SHRINK_WIDTH, _EXPAND_H, _EXPAND_OUT, _EXPAND_PARTS = 5, 1, 7, 8
"""Argument positions of `lora_shrink` and `lora_expand`."""


@dataclass(frozen=True, slots=True)
class LocalizeLora:
    """Remove the collective between the factors of every site whose layout is local."""

    name: ClassVar[str] = "localize"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.TAGGED, Fact.PARTITIONED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.LORA_LOCAL})

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        graph, plan = captured.graph, context.plan
        matches, refusals = 0, []
        for expand in list(stage_nodes(graph, _EXPAND)):
            site = _site_of(expand)
            if plan.layouts[site] is not Layout.LOCAL:
                refusals.append(Refusal(site, "its factors are stored in S-LoRA placement (strategy='slora')"))
                continue
            matches += _localize(graph, expand, plan)
        return PassStats(matches=matches, refusals=refusals)

    def verify(self, captured: Captured, context: PassContext) -> None:
        for expand in stage_nodes(captured.graph, _EXPAND):
            site = _site_of(expand)
            if context.plan.layouts[site] is Layout.LOCAL and operator_name(_h_of(expand)) != _SHRINK:
                raise PassError(
                    f"LoRA site {site}",
                    found=f"{operator_name(_h_of(expand))} between its factors",
                    expected="nothing: its layout is local",
                    remedy="report this with the graph",
                )


def _localize(graph: Graph, expand: Node, plan: ModelPlan) -> bool:
    """Rewrite one site; False if it is local already."""
    bridge = _bridge_before(expand)
    shrink = bridge[-1].all_input_nodes[0] if bridge else _h_of(expand)
    site = plan.sites[_site_of(expand)]
    width = rank_capacity(plan.max_rank, site, Layout.LOCAL, plan.mesh)
    _, out_features = local_features(site, Layout.LOCAL, plan.mesh)
    is_local = not bridge and shrink.args[_SHRINK_WIDTH] == width and expand.args[_EXPAND_OUT] == [out_features]
    shrink.update_arg(_SHRINK_WIDTH, width)
    expand.update_arg(_EXPAND_H, shrink)
    expand.update_arg(_EXPAND_OUT, [out_features])
    expand.update_arg(_EXPAND_PARTS, 1)
    erase_unused(graph, bridge)
    return not is_local


def _bridge_before(expand: Node) -> list[Node]:
    """Nodes between a site's expand and its shrink, nearest to the expand first.

    Raises:
        PassError: something other than communication lies between them.
    """
    bridge: list[Node] = []
    pending = [_h_of(expand)]
    while pending:
        node = pending.pop(0)
        if operator_name(node) == _SHRINK or node in bridge:
            continue
        if operator_name(node) not in _BRIDGE:
            raise PassError(
                f"LoRA site {_site_of(expand)}",
                found=f"{node.name} ({operator_name(node)}) between its factors",
                expected="collectives alone",
                remedy="report this with the graph",
            )
        bridge.append(node)
        pending += node.all_input_nodes
    return bridge


def _h_of(expand: Node) -> Node:
    h = expand.args[_EXPAND_H]
    assert isinstance(h, Node), f"{expand.name}: h is a tensor of the graph"
    return h


def _site_of(node: Node) -> str:
    site = record(node).site
    assert site is not None, f"{node.name}: a LoRA node belongs to a site"
    return site
