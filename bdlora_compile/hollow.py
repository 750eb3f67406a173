"""Hollow parameters: full shape and no memory, so that a rank never holds the whole model.

A hollow parameter is one NaN expanded with stride 0. Every module that owns one passes its input through
`shard_only`, an operator that partitioning erases and whose real implementation raises: a hollow module that is run
in any other way than through the backend (uncompiled, alone, by another backend, past the recompile limit) says so
instead of computing with NaN.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bdlora_compile.errors import HollowError

if TYPE_CHECKING:
    from bdlora_compile.runtime.deployment import Deployment


class HollowTag(NamedTuple):
    """What a hollow parameter says of itself: its name in the plain model, and the deployment it belongs to."""

    name: str
    deployment: "Deployment"


@torch.library.custom_op("bdlora::shard_only", mutates_args=())
def shard_only(x: Tensor, module: str) -> Tensor:
    """Identity in a graph that the backend compiles; anywhere else an error.

    Raises:
        HollowError: always, since the backend erases every use.
    """
    raise HollowError(
        module,
        found="a run outside the bdlora backend (uncompiled, by another backend, or past Dynamo's recompile limit)",
        expected="a run through `model.compile(backend='bdlora')`: this module's weights live in the ranks' shards",
        remedy="call `model.compile(backend='bdlora')`, then `model(...)` or `model.generate(...)`; "
        "`torch.compile(model).generate` runs the uncompiled model",
    )


@shard_only.register_fake
def _(x: Tensor, module: str) -> Tensor:
    return torch.empty_like(x)


def hollow_out(model: PreTrainedModel, deployment: "Deployment", *, is_guarded: bool = True) -> None:
    """Replace every parameter by a hollow one, tied parameters by the same one, and guard the modules that own them.

    Without guards (``is_guarded`` False) only for a model that is traced and thrown away: guards take time to trace.
    """
    replaced: dict[Tensor, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        own = list(module.named_parameters(recurse=False))
        for name, parameter in own:
            if parameter not in replaced:
                replaced[parameter] = _hollow(parameter, HollowTag(f"{module_name}.{name}".lstrip("."), deployment))
            setattr(module, name, replaced[parameter])
        if own and is_guarded:
            module.register_forward_pre_hook(_guard(module_name))


def tag_of(value: object) -> HollowTag | None:
    """The tag of a hollow parameter, None for anything else."""
    tag = getattr(value, "bdlora_tag", None)
    return tag if isinstance(tag, HollowTag) else None


def materialize_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give buffers of a model that was built on the meta device their values (rotary frequencies)."""
    for module in model.modules():
        meta = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in meta:
            # NaN first, so that a buffer that no initializer writes is noticed below.
            setattr(module, name, torch.full_like(getattr(module, name), math.nan, device="cpu"))
        if meta:
            model._init_weights(module)
            _check_initialized(module, meta)
            for name in meta:
                setattr(module, name, getattr(module, name).to(device))


def _check_initialized(module: nn.Module, names: list[str]) -> None:
    for name in names:
        if torch.isnan(getattr(module, name)).any():
            raise HollowError(
                f"buffer {name} of {type(module).__name__}",
                found="no initial value",
                expected="a value from the model's own initializer",
                remedy="load the model with transformers and pass it to `bdlora_compile.attach`",
            )


def _hollow(parameter: nn.Parameter, tag: HollowTag) -> nn.Parameter:
    element = torch.full((1,), math.nan, dtype=parameter.dtype, device=tag.deployment.plan.device)
    hollow = nn.Parameter(element.expand(parameter.shape), requires_grad=False)
    hollow.bdlora_tag = tag  # type: ignore[attr-defined]  # read back by `tag_of`
    return hollow


def _guard(module_name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def guard(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (shard_only(args[0], module_name), *args[1:])

    guard.bdlora_module = module_name  # type: ignore[attr-defined]  # read back by `guards`
    return guard


def guards(hook: object, module_name: str) -> bool:
    """Whether a hook is the guard of the module of that name, and no other one's."""
    return getattr(hook, "bdlora_module", None) == module_name
