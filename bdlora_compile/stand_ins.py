"""Of layers that are alike Dynamo traces one: the others are an operator each, and `unfold` puts copies in their place.

Tracing a layer takes Dynamo a quarter of a second and more, and it would find the same every time. A layer stands in
for another where `alike.py` finds them alike; what each of them is given is written beside it into the graph, and
`unfold` compares it. Only forwards of `ServedModel` are traced so: they look at the layers again before each.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bdlora_compile.alike import kind_of, number_use
from bdlora_compile.errors import HollowError
from bdlora_compile.runtime.cache import LocalCache

_OWN = frozenset({"bdlora_like", "bdlora_number", "bdlora_stand_ins"})


@torch.library.custom_op("bdlora::layer_input", mutates_args=())
def layer_input(hidden: Tensor, others: Sequence[Tensor], constants: str, layer: int) -> Tensor:
    """``hidden`` as it enters a layer that others are like; `unfold` erases it.

    Args:
        hidden: [batch, seq, hidden].
        others: all other tensors that the layer is called with.
        constants: its other arguments.
        layer: its number.
    """
    raise _not_compiled()


@torch.library.custom_op("bdlora::layer_output", mutates_args=())
def layer_output(hidden: Tensor, layer: int) -> Tensor:
    """``hidden`` as it leaves a layer that others are like; `unfold` erases it."""
    raise _not_compiled()


@torch.library.custom_op("bdlora::layer_again", mutates_args=())
def layer_again(hidden: Tensor, others: Sequence[Tensor], constants: str, like: int, layer: int) -> Tensor:
    """What ``layer`` makes of its arguments (see `layer_input`), being like the layer ``like`` that is traced."""
    raise _not_compiled()


@layer_input.register_fake
def _(hidden: Tensor, others: Sequence[Tensor], constants: str, layer: int) -> Tensor:
    return torch.empty_like(hidden)


@layer_output.register_fake
def _(hidden: Tensor, layer: int) -> Tensor:
    return torch.empty_like(hidden)


@layer_again.register_fake
def _(hidden: Tensor, others: Sequence[Tensor], constants: str, like: int, layer: int) -> Tensor:
    return torch.empty_like(hidden)


class StandInLayer(nn.Module):
    """Mixed into the class of a loaded model's decoder layers; its methods are for Dynamo to trace.

    Attributes:
        bdlora_stand_ins: whether layers stand in for others in this forward.
        bdlora_number: of this layer.
        bdlora_like: the layer that is traced for this one; its own number if it is traced for others; None: for itself.
    """

    bdlora_stand_ins: "StandIns"
    bdlora_number: int
    bdlora_like: int | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer, or one operator that says which layer it is like."""
        if not self.bdlora_stand_ins.is_active or self.bdlora_like is None:
            return super().__call__(*args, **kwargs)
        found = _operands(args, kwargs)
        if found is None:
            return super().__call__(*args, **kwargs)
        others, constants = found
        if self.bdlora_like != self.bdlora_number:
            return layer_again(args[0], others, constants, self.bdlora_like, self.bdlora_number)
        output = super().__call__(layer_input(args[0], others, constants, self.bdlora_number), *args[1:], **kwargs)
        return layer_output(output, self.bdlora_number) if isinstance(output, Tensor) else output


def _operands(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], str] | None:
    """Tensors and other arguments of a call without the first; None if one is of a kind that is not compared."""
    if len(args) == 0 or not isinstance(args[0], Tensor):
        return None
    tensors, constants = [], ""
    for name, value in [*enumerate(args[1:]), *kwargs.items()]:
        if isinstance(value, Tensor):
            tensors.append(value)
            constants += f"{name}: tensor, "
        elif value is None or isinstance(value, (bool, str)):
            constants += f"{name}={value}, "
        elif isinstance(value, LocalCache):
            constants += f"{name}: cache, "
        elif _is_pair(value):
            # Cosines and sines.
            tensors.extend(value)
            constants += f"{name}: two tensors, "
        else:
            return None
    return tensors, constants


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor) and isinstance(value[1], Tensor)
    )


class StandIns:
    """Which layers of a model are traced, and for which others.

    Args:
        path: module path of the list of layers.
        layers: the list.

    Attributes:
        path, layers: as above.
        is_active: whether the forward that runs may be traced with layers that stand in.
        reason: why every layer is traced; empty if that need not be.
    """

    def __init__(self, path: str, layers: nn.ModuleList) -> None:
        self.path = path
        self.layers = layers
        self.is_active = False
        self.reason = ""
        use = number_use(layers)
        mixed = {cls: _with_stand_ins(cls) for cls in dict.fromkeys(map(type, layers))}
        for number, layer in enumerate(layers):
            layer.__class__ = mixed[type(layer)]
            # Past `nn.Module.__setattr__`, which is for parameters and modules.
            vars(layer).update(bdlora_stand_ins=self, bdlora_number=number, bdlora_like=None)
        if use:
            self.refuse(f"the layers' code may depend on their number ({use})")

    def refuse(self, reason: str) -> None:
        """Have every layer traced from now on."""
        self.reason = reason
        self._write([None] * len(self.layers))

    @contextmanager
    def in_forward(self) -> Iterator[None]:
        """For one forward: look which layers are alike now, and let them stand in."""
        if not self.reason:
            self._write(self._likes())
        self.is_active = not self.reason
        try:
            yield
        finally:
            self.is_active = False

    def text(self, traced: int, copied: int) -> str:
        """For the report of a graph."""
        if copied:
            return f"{traced} layers, and {copied} others of which each is like one of these"
        unlike = "no layer but the last is like one before" if len(self.layers) > 2 else "few layers"
        has_likes = any(layer.bdlora_like is not None for layer in self.layers)
        found = "a layer has an argument that is not compared" if has_likes else unlike
        return f"every layer: {self.reason or found}"

    def _likes(self) -> list[int | None]:
        """For each layer the first that is like it; None for those that are like no other.

        The last one is traced in any case: a cache counts its tokens after it.
        """
        paths = [f"{self.path}.{number}" for number in range(len(self.layers))]
        kinds = [
            kind_of(layer, path, number, _OWN)
            for number, (path, layer) in enumerate(zip(paths[:-1], self.layers, strict=False))
        ]
        first = {kind: number for number, kind in reversed([*enumerate(kinds)])}
        likes = [first[kind] for kind in kinds]
        return [*(like if likes.count(like) > 1 else None for like in likes), None]

    def _write(self, likes: Sequence[int | None]) -> None:
        for layer, like in zip(self.layers, likes, strict=True):
            # A change would have Dynamo look at all its guards again.
            if layer.bdlora_like != like:
                layer.bdlora_like = like  # type: ignore[assignment]  # typed for modules and tensors alone


def _with_stand_ins(cls: type) -> type:
    return type(cls.__name__, (StandInLayer, cls), {"__module__": cls.__module__})


def _not_compiled() -> HollowError:
    return HollowError(
        "decoder layer",
        found="a run outside the bdlora backend",
        expected="a run through `model.compile(backend='bdlora')`: these operators are erased there",
        remedy="call `model.compile(backend='bdlora')`, then `model(...)` or `model.generate(...)`",
    )
