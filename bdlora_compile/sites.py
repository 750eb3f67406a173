"""The linear layers of a model that a LoRA adapter can change, and the role each plays in tensor parallelism."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    """One linear layer that adapters can target.

    Attributes:
        name: module path in the plain model, for example ``model.layers.0.self_attn.q_proj``.
        role: how tensor parallelism splits its weight.
        in_features: D of the whole layer.
        out_features: O of the whole layer.
        unit: features that must stay together on the split dim: ``head_dim`` of attention projections, else 1.
    """

    name: str
    role: Role
    in_features: int
    out_features: int
    unit: int = 1

    @property
    def num_units(self) -> int:
        """Pieces the split dim can be cut into: attention heads, or features."""
        return (self.out_features if self.role is Role.COLUMN else self.in_features) // self.unit


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
