"""The layers of a model that a LoRA adapter can change, and the role each plays in tensor parallelism."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel


class Role(Enum):
    """How tensor parallelism splits the weight W [O, D] of a linear layer."""

    COLUMN = "column"
    """W is split on its output dim O; every rank sees all of x (q, k, v, gate and up projections)."""
    ROW = "row"
    """W is split on its input dim D; the base all-reduce sums the partial results (o and down projections)."""


@dataclass(frozen=True, slots=True)
class Site:
    """One linear layer or embedding that adapters can target.

    Attributes:
        name: module path in the plain model, for example ``model.layers.0.self_attn.q_proj``.
        role: how tensor parallelism splits its weight.
        in_features: D of the whole layer.
        out_features: O of the whole layer.
        unit: features that must stay together on the split dim: ``head_dim`` of attention projections, else 1.
        vocabulary: the split dim is the vocabulary V, which N ranks cut into pieces of ceil(V / N). A column site of
            that kind makes logits. A row site is an embedding: its weight [V, O] is W transposed, its x is one-hot.
        tied_weight: parameter of another layer that is this one's weight too.
    """

    name: str
    role: Role
    in_features: int
    out_features: int
    unit: int = 1
    vocabulary: bool = False
    tied_weight: str | None = None

    @property
    def weight(self) -> str:
        """Name of the parameter that is the layer's weight."""
        return self.tied_weight or f"{self.name}.weight"

    @property
    def is_lookup(self) -> bool:
        """Whether the layer is an embedding: it reads token ids, and columns of A are looked up by them."""
        return self.vocabulary and self.role is Role.ROW

    @property
    def split_features(self) -> int:
        """Features of the dim that tensor parallelism splits."""
        return self.out_features if self.role is Role.COLUMN else self.in_features

    @property
    def num_units(self) -> int:
        """Pieces the split dim can be cut into: attention heads, or features."""
        return self.split_features // self.unit


# The words transformers uses in a model's tensor-parallel plan, and the role each gives a linear layer.
_PLAN_ROLES = {"colwise": Role.COLUMN, "rowwise": Role.ROW}


def declared_roles(model: PreTrainedModel) -> dict[str, Role] | None:
    """Roles of linear layers by pattern, as the model's own tensor-parallel plan has them; None without a plan."""
    plan = getattr(model.config, "base_model_tp_plan", None)
    if not plan:
        return None
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    return {prefix + pattern: _PLAN_ROLES[style] for pattern, style in plan.items() if style in _PLAN_ROLES}


def find_sites(model: PreTrainedModel, roles: Mapping[str, Role]) -> dict[str, Site]:
    """The linear layers that ``roles`` names by pattern, in module order."""
    found = ((name, module, _role_of(name, roles)) for name, module in _linears(model))
    return {name: _site(name, module, role, model) for name, module, role in found if role is not None}


def vocabulary_sites(model: PreTrainedModel) -> dict[str, Site]:
    """The embedding of tokens and the layer that makes logits, where they are plain ones."""
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = []
    if isinstance(embedding, nn.Embedding):
        found.append(Site(names[embedding], Role.ROW, embedding.num_embeddings, embedding.embedding_dim))
    if isinstance(head, nn.Linear):
        found.append(Site(names[head], Role.COLUMN, head.in_features, head.out_features))
    owners = {parameter: name for name, parameter in model.named_parameters()}
    weights = {site.name: owners[model.get_parameter(site.weight)] for site in found}
    return {
        site.name: replace(
            site, vocabulary=True, tied_weight=None if weights[site.name] == site.weight else weights[site.name]
        )
        for site in found
    }


def in_module_order(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Site]:
    """The sites in the order of the model's modules, so that those of a layer follow one another."""
    return {name: sites[name] for name, _ in model.named_modules() if name in sites}


def unsplit_layers(model: PreTrainedModel, sites: Mapping[str, Site]) -> list[str]:
    """Linear layers of the decoder that no role splits: every rank holds them whole."""
    return [
        name for name, _ in _linears(model) if any(part.isdecimal() for part in name.split(".")) and name not in sites
    ]


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))


def _role_of(name: str, roles: Mapping[str, Role]) -> Role | None:
    return next((role for pattern, role in roles.items() if fnmatchcase(name, pattern)), None)


def _site(name: str, module: nn.Linear, role: Role, model: nn.Module) -> Site:
    parent = model.get_submodule(name.rpartition(".")[0])
    # An attention projection is cut between heads, never inside one; its module knows the size of a head.
    unit = int(getattr(parent, "head_dim", 1))
    return Site(name, role, module.in_features, module.out_features, unit)
