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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch.fx import Graph, Node

from bdlora_compile.collectives import ALL_GATHER, ALL_REDUCE, WAIT
from bdlora_compile.errors import PassError
from bdlora_compile.factors import Layout, local_features
from bdlora_compile.ir import Captured, Fact, operator_name, record
from bdlora_compile.lora_nodes import ExpandArguments, bridge_of, first_half, is_expand, is_lookup, is_shrink
from bdlora_compile.pass_manager import PassContext, erase_unused
from bdlora_compile.plan import ModelPlan
from bdlora_compile.report import PassStats, Refusal

_BRIDGE = frozenset({ALL_GATHER, ALL_REDUCE, WAIT, "chunk", "getitem", "cat"})
"""What may lie between the factors: communication, and moving what it brought."""


@dataclass(frozen=True, slots=True)
class LocalizeLora:
    """Remove the collective between the factors of every site whose layout is local."""

    name: ClassVar[str] = "localize"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.TAGGED, Fact.PARTITIONED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.LORA_LOCAL})

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        graph, plan = captured.graph, context.plan
        matches, refusals = 0, []
        for expand in [node for node in graph.nodes if is_expand(node)]:
            site = _site_of(expand)
            if plan.layouts[site] is not Layout.LOCAL:
                refusals.append(Refusal(site, "its factors are stored in S-LoRA placement (strategy='slora')"))
                continue
            matches += _localize(graph, expand, plan)
        return PassStats(matches=matches, refusals=refusals)

    def verify(self, captured: Captured, context: PassContext) -> None:
        for expand in (node for node in captured.graph.nodes if is_expand(node)):
            site, h = _site_of(expand), ExpandArguments.of(expand).h
            if context.plan.layouts[site] is Layout.LOCAL and not (is_shrink(h) or is_lookup(h)):
                raise PassError(
                    f"LoRA site {site}",
                    found=f"{operator_name(h)} between its factors",
                    expected="nothing: its layout is local",
                    remedy="report this with the graph",
                )


def _localize(graph: Graph, expand: Node, plan: ModelPlan) -> bool:
    """Rewrite one site; False if it is local already."""
    shrink, bridge = bridge_of(expand)
    _check_bridge(bridge, expand)
    site = plan.sites[_site_of(expand)]
    width = plan.max_local_rank
    _, out_features = local_features(site, Layout.LOCAL, plan.mesh)
    before = first_half(shrink), ExpandArguments.of(expand)
    after = replace(before[0], width=width), replace(before[1], h=shrink, out_features=[out_features], parts=1)
    after[0].write_to(shrink)
    after[1].write_to(expand)
    erase_unused(graph, bridge)
    return before != after


def _check_bridge(bridge: Sequence[Node], expand: Node) -> None:
    """
    Raises:
        PassError: something other than communication lies between a site's factors.
    """
    for node in bridge:
        if operator_name(node) not in _BRIDGE:
            raise PassError(
                f"LoRA site {_site_of(expand)}",
                found=f"{node.name} ({operator_name(node)}) between its factors",
                expected="collectives alone",
                remedy="report this with the graph",
            )


def _site_of(node: Node) -> str:
    site = record(node).site
    assert site is not None, f"{node.name}: a LoRA node belongs to a site"
    return site
