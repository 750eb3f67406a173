"""Find what the plan names in the graph, once: weights, inputs and LoRA sites. Later passes read the records.

Before:  y = linear(x, placeholder)                after:  y = linear(x, weight W)  @model.layers.0.mlp.up_proj
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, Node

from bdlora_compile.errors import PassError
from bdlora_compile.hollow import tag_of
from bdlora_compile.ir import (
    Captured,
    Fact,
    InputSource,
    WeightSource,
    fake_tensor,
    is_tensor,
    layer_of,
    operator_name,
    placeholders,
    record,
    set_record,
    stage_nodes,
)
from bdlora_compile.pass_manager import PassContext
from bdlora_compile.report import PassStats, Refusal

_CACHE_UPDATE = "bdlora::cache_update"


@dataclass(frozen=True, slots=True)
class Tag:
    """Write a source on every placeholder and a site on every layer that adapters may change."""

    name: ClassVar[str] = "tag"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.TAGGED})

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        graph = captured.graph
        _tag_placeholders(graph)
        found, num_new = _tag_sites(graph, context)
        captured.token_input = _find_token_input(graph)
        absent = [
            Refusal(name, "this graph has no layer of that name") for name in context.plan.sites if name not in found
        ]
        whole = [] if context.plan.mesh.size == 1 else _unsplit(graph, context)
        return PassStats(matches=num_new, refusals=[*absent, *whole])

    def verify(self, captured: Captured, context: PassContext) -> None:
        """Nothing beyond shapes: the pass writes records only."""


def _tag_placeholders(graph: Graph) -> None:
    rank_local = {node.args[0] for node in stage_nodes(graph, _CACHE_UPDATE)}
    for index, node in enumerate(placeholders(graph)):
        example = node.meta["grapharg"].example if "grapharg" in node.meta else None
        tag = tag_of(example)
        if tag is None:
            set_record(node, source=InputSource(index, rank_local=node in rank_local))
        else:
            set_record(node, source=WeightSource(tag.name, tuple(fake_tensor(node).shape)))


def _tag_sites(graph: Graph, context: PassContext) -> tuple[set[str], int]:
    """Names of the sites in the graph, and how many nodes were not marked before."""
    # The embedding and the layer that makes logits may have one weight: the operator tells them apart.
    lookups = {site.weight: site.name for site in context.plan.sites.values() if site.is_lookup}
    linears = {site.weight: site.name for site in context.plan.sites.values() if not site.is_lookup}
    found, num_new = set[str](), 0
    for name, sites in (("embedding", lookups), ("linear", linears)):
        for node in stage_nodes(graph, name):
            site = sites.get(weight_name(node) or "")
            if site is not None:
                num_new += record(node).site != site
                set_record(node, site=site)
                found.add(site)
    return found, num_new


def _unsplit(graph: Graph, context: PassContext) -> list[Refusal]:
    """Linear layers of the decoder that the plan leaves whole."""
    names = [name for node in stage_nodes(graph, "linear") if (name := weight_name(node)) and layer_of(name)]
    reason = "every rank holds it whole: the model's plan does not split it"
    return [Refusal(name, reason) for name in names if name not in context.plan.weights]


def weight_name(node: Node) -> str | None:
    """The parameter that is a linear or embedding node's weight, None if it is no parameter."""
    weight = node.args[1]
    source = record(weight).source if isinstance(weight, Node) else None
    return source.parameter if isinstance(source, WeightSource) else None


def _find_token_input(graph: Graph) -> Node:
    """The forward's ids [batch, seq], or its embeddings [batch, seq, hidden]."""
    for node in stage_nodes(graph, "embedding"):
        ids = node.args[0]
        if weight_name(node) and isinstance(ids, Node) and ids.op == "placeholder":
            return ids
    for node in placeholders(graph):
        is_input = isinstance(record(node).source, InputSource)
        if is_input and is_tensor(node) and fake_tensor(node).is_floating_point() and fake_tensor(node).ndim == 3:
            return node
    raise PassError(
        "inputs of the graph",
        found=", ".join(f"{node.name}: {operator_name(node)}" for node in placeholders(graph)[:5]),
        expected="input_ids [batch, seq] that an embedding reads, or inputs_embeds [batch, seq, hidden]",
        remedy="compile the whole model, not a part of it; on a graph break see TORCH_LOGS=graph_breaks",
    )
