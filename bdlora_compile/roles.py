"""Which role each linear layer has in tensor parallelism, found from what feeds what in the captured graph.

A decoder layer adds to a residual stream: every path from its input to its result goes through the stream's values (the
dominators of the result). Between two of them lies a block, such as attention. A linear layer that begins a block can
be split on its outputs (column), one that ends it on its inputs (row), and the block's inside stays on its rank.
"""

from collections.abc import Callable, Sequence
from typing import Any

import networkx as nx
import torch
from torch import nn
from torch.fx import GraphModule, Node
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from bdlora_compile.errors import PlacementError
from bdlora_compile.ir import (
    Captured,
    InputSource,
    WeightSource,
    operator_name,
    placeholders,
    record,
    set_record,
)
from bdlora_compile.layers import UnlikeLayersError, find_layers
from bdlora_compile.sites import Role, Site, declared_roles, find_sites

_PROBE_LAYERS = 2
"""Layers of the small copy that a model without a plan is traced with; a chain of layers needs two."""


def roles_between(carried: Node, nodes: Sequence[Node], result: Node) -> dict[Node, Role]:
    """Roles of the linear calls among ``nodes``, which lead from ``carried`` to ``result``; others are left out."""
    inside = {carried, *nodes}
    flow: nx.DiGraph[Node] = nx.DiGraph()
    flow.add_edges_from((operand, node) for node in nodes for operand in node.all_input_nodes if operand in inside)
    stream = _stream(flow, carried, result)
    blocks = flow.subgraph([node for node in flow if node not in stream])
    linears = [node for node in blocks if operator_name(node) == "linear"]
    roles: dict[Node, Role] = {}
    for linear in linears:
        is_first = nx.ancestors(blocks, linear).isdisjoint(linears)
        is_last = nx.descendants(blocks, linear).isdisjoint(linears)
        if is_first != is_last:
            roles[linear] = Role.COLUMN if is_first else Role.ROW
    return roles


def _stream(flow: "nx.DiGraph[Node]", carried: Node, result: Node) -> set[Node]:
    """The values that every path from ``carried`` to ``result`` goes through."""
    dominator = nx.immediate_dominators(flow, carried)
    stream = {carried}
    while result not in stream:
        stream.add(result)
        result = dominator[result]
    return stream


def sites_of(model: PreTrainedModel) -> dict[str, Site]:
    """The linear layers that adapters may change: those of the model's own plan, or found by tracing a small copy.

    Raises:
        PlacementError: the model has no plan and the trace finds no roles.
    """
    declared = declared_roles(model)
    return find_sites(model, probe_roles(model.config) if declared is None else declared)


def probe_roles(config: PretrainedConfig) -> dict[str, Role]:
    """Roles of the linear layers of a model that brings no plan, by pattern: ``model.layers.*.mlp.up_proj``.

    A copy of two layers is traced on the meta device: no weights, no memory.

    Raises:
        PlacementError: its layers are not a chain, or no linear layer has a role.
    """
    settings = config.to_dict() | {"num_hidden_layers": _PROBE_LAYERS}
    if settings.get("layer_types"):
        settings["layer_types"] = settings["layer_types"][:_PROBE_LAYERS]
    small = type(config).from_dict(settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small)
        ids = torch.zeros(2, 4, dtype=torch.int64)
    captured = _trace(model, ids)
    try:
        stack = find_layers(captured.graph)
    except UnlikeLayersError as unlike:
        raise _no_roles(config, str(unlike)) from None
    layer = stack.layers[0]
    found = roles_between(layer.carried, layer.nodes, layer.result)
    if not found:
        raise _no_roles(config, "no linear layer begins or ends a block between residual additions")
    patterns = {_weight_of(linear): role for linear, role in found.items()}
    return {
        name.removesuffix(".weight").replace(f"{stack.prefix}.0.", f"{stack.prefix}.*."): role
        for name, role in patterns.items()
    }


def _trace(model: nn.Module, ids: torch.Tensor) -> Captured:
    """Dynamo's graph of a forward, with parameters' names on their placeholders."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    graphs: list[Captured] = []

    def keep(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for index, node in enumerate(placeholders(module.graph)):
            example = node.meta["grapharg"].example if "grapharg" in node.meta else None
            name = names.get(id(example))
            shape = tuple(getattr(example, "shape", ()))
            set_record(node, source=InputSource(index) if name is None else WeightSource(name, shape))
        graphs.append(Captured(module, module.graph).copy())
        return module.forward

    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(ids, use_cache=False)
    return graphs[0]


def _weight_of(linear: Node) -> str:
    weight = linear.args[1]
    source = record(weight).source if isinstance(weight, Node) else None
    assert isinstance(source, WeightSource), f"{linear.name}: a linear layer's weight is a parameter"
    return source.parameter


def _no_roles(config: PretrainedConfig, found: str) -> PlacementError:
    return PlacementError(
        f"tensor-parallel plan of {type(config).__name__}",
        found=f"none, and in the traced model: {found}",
        expected="`config.base_model_tp_plan`, or decoder layers whose linear layers begin and end blocks",
        remedy="use a Llama-like model",
    )
