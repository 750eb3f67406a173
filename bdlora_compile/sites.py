"""The linear layers of a model that a LoRA adapter can change, and the role each plays in tensor parallelism."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from bdlora_compile.errors import PlacementError


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


def find_sites(model: PreTrainedModel) -> dict[str, Site]:
    """List the linear layers that the model's own tensor-parallel plan splits, in module order.

    Raises:
        PlacementError: the model has no plan.
    """
    plan = _tp_plan(model)
    roles = ((name, module, _role_of(name, plan)) for name, module in _linears(model))
    return {name: _site(name, module, role, model) for name, module, role in roles if role is not None}


def _tp_plan(model: PreTrainedModel) -> dict[str, str]:
    base_plan = getattr(model.config, "base_model_tp_plan", None)
    if not base_plan:
        raise PlacementError(
            f"tensor-parallel plan of {type(model).__name__}",
            found="none",
            expected="`config.base_model_tp_plan`, which names the role of each linear layer",
            remedy="use a model with a plan, such as Llama",
        )
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    return {prefix + pattern: style for pattern, style in base_plan.items()}


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))


def _role_of(name: str, plan: dict[str, str]) -> Role | None:
    styles = (style for pattern, style in plan.items() if fnmatchcase(name, pattern))
    return next((_PLAN_ROLES[style] for style in styles if style in _PLAN_ROLES), None)


def _site(name: str, module: nn.Linear, role: Role, model: nn.Module) -> Site:
    parent = model.get_submodule(name.rpartition(".")[0])
    # An attention projection is cut between heads, never inside one; its module knows the size of a head.
    unit = int(getattr(parent, "head_dim", 1))
    return Site(name, role, module.in_features, module.out_features, unit)
