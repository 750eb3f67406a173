"""How a model is spread over the ranks: decided once, when it is loaded, and read by every graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from bdlora_compile.factors import Layout
from bdlora_compile.placement import Mesh, Placement, Replicate, Shard, check_split, site_pieces
from bdlora_compile.sites import Role, Site
from bdlora_compile.strategy import Decision


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """Placements of a model's parameters and layouts of its LoRA sites on a mesh.

    Attributes:
        model: class name of the model.
        mesh: the ranks.
        sites: linear layers that adapters may change, in module order; a site's position is its row in slot tables.
        layouts: layout of each site.
        weights: placement of each parameter that is not replicated, by name.
        gathered: weights of linear layers whose output is gathered at once (the logits).
        max_rank: largest adapter rank R that the bank admits.
        max_local_rank: largest rank of factors on one rank that sites of the local layout admit.
        dtype, device: of activations, weights and factors.
        decisions: why each group of sites has its layout.
    """

    model: str
    mesh: Mesh
    sites: Mapping[str, Site]
    layouts: Mapping[str, Layout]
    weights: Mapping[str, Placement]
    gathered: frozenset[str]
    max_rank: int
    max_local_rank: int
    dtype: torch.dtype
    device: torch.device
    decisions: Sequence[Decision] = ()

    def placement_of(self, parameter: str) -> Placement:
        """Placement of a parameter."""
        return self.weights.get(parameter, Replicate())

    @property
    def is_for_gpus(self) -> bool:
        """Whether graphs take the forms for which there are kernels."""
        return self.device.type == "cuda"

    def rows(self, layer: str | None) -> slice:
        """Rows of the slot tables that belong to the sites of a layer (a module path); None is all of them."""
        if layer is None:
            return slice(0, len(self.sites))
        rows = [row for row, name in enumerate(self.sites) if name.startswith(f"{layer}.")]
        assert rows == list(range(rows[0], rows[-1] + 1)), f"{layer}: its sites follow one another in module order"
        return slice(rows[0], rows[-1] + 1)

    def row(self, site: str, layer: str | None) -> int:
        """Row of a site among the `rows` of a layer."""
        return list(self.sites).index(site) - self.rows(layer).start


def check_degree(model: PreTrainedModel, sites: Mapping[str, Site], mesh: Mesh) -> None:
    """Whether the ranks can share all of a model's ``sites``.

    Raises:
        PlacementError: the mesh does not divide a layer.
    """
    heads = getattr(model.config, "num_attention_heads", None)
    kv_heads = getattr(model.config, "num_key_value_heads", None) or heads
    check_split(sites.values(), mesh, f"a model with {heads} heads and {kv_heads} kv heads" if heads else "")


def plan_model(
    model: PreTrainedModel,
    sites: Mapping[str, Site],
    mesh: Mesh,
    layouts: Mapping[str, Layout],
    max_rank: int,
    dtype: torch.dtype,
    device: torch.device,
    decisions: Sequence[Decision] = (),
    max_local_rank: int | None = None,
    layers: Mapping[str, Site] | None = None,
) -> ModelPlan:
    """Decide where every parameter of ``model`` lies; layouts were decided before (`strategy.py`).

    ``max_local_rank`` is ``max_rank`` where adapters may be ordinary ones. ``layers`` are the linear layers that ranks
    share: those of ``sites``, and others that adapters may not change.

    Raises:
        PlacementError: the mesh does not divide a layer.
    """
    weights: dict[str, Placement] = {}
    for site in (sites if layers is None else layers).values():
        if site.vocabulary:
            continue  # placed below, whether adapters may change it or not
        module = model.get_submodule(site.name)
        for name, placement in _site_placements(site, mesh).items():
            if getattr(module, name, None) is not None:
                weights[f"{site.name}.{name}"] = placement
    names = _parameter_names(model)
    vocabulary = [module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module]
    # Tied embeddings are one parameter, placed once: parallel on the vocabulary, which both uses agree on.
    weights |= {names[weight]: Shard(0, mesh.size) for weight in vocabulary}
    head = model.get_output_embeddings()
    gathered = frozenset([names[head.weight]]) if isinstance(head, nn.Linear) else frozenset()
    if mesh.size == 1:
        weights, gathered = {}, frozenset()
    name = type(model).__name__
    local = max_rank if max_local_rank is None else max_local_rank
    return ModelPlan(name, mesh, sites, layouts, weights, gathered, max_rank, local, dtype, device, decisions)


def _site_placements(site: Site, mesh: Mesh) -> dict[str, Placement]:
    pieces = site_pieces(site, mesh)
    if pieces == 1:
        # One kv head on several ranks: every rank holds all of it.
        return {}
    if site.role is Role.COLUMN:
        return {"weight": Shard(0, pieces), "bias": Shard(0, pieces)}
    return {"weight": Shard(1, pieces)}


def _parameter_names(model: nn.Module) -> dict[torch.Tensor, str]:
    """The name of each parameter; of a tied one the first."""
    return {parameter: name for name, parameter in model.named_parameters()}
