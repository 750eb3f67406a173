"""Of layers that are alike Dynamo traces one: the others are an operator each, and `unfold` puts copies in their place.

It would find the same in every layer, and take as long. A layer stands in for another where `alike.py` finds them
alike; what each of them is given is written beside it into the graph, and `unfold` compares it. Only forwards of
`ServedModel` and explanations are traced so: they look at the layers before each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bdlora_compile.alike import Attributes, kind_of, number_use
from bdlora_compile.errors import HollowError, PassError
from bdlora_compile.runtime.cache import LocalCache

Result = TypeVar("Result")

_OWN = frozenset({"bdlora_like", "bdlora_number", "bdlora_stand_ins"})


class StandInError(PassError):
    """A layer stands in for one that gets other things than it, or that the graph does not hold by itself."""


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
        bdlora_stand_ins: of the model.
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
    """Tensors and other arguments of a call without the first; None if one is of a kind that is not compared.

    Dynamo walks through this for each layer: few steps, and none that its releases treat differently.
    """
    if len(args) == 0 or not isinstance(args[0], Tensor):
        return None
    tensors, constants = [], ""
    for name in kwargs:
        constants += name + " "
    for value in (*args[1:], *kwargs.values()):
        if isinstance(value, Tensor):
            tensors.append(value)
            constants += "tensor "
        elif value is None or isinstance(value, bool):
            constants += str(value) + " "
        elif isinstance(value, str):
            constants += "'" + value + "' "
        elif isinstance(value, LocalCache):
            constants += "cache "
        elif _is_pair(value):
            # Cosines and sines.
            tensors.append(value[0])
            tensors.append(value[1])
            constants += "pair "
        else:
            return None
    return tensors, constants


def _is_pair(value: Any) -> bool:
    is_two = isinstance(value, tuple) and len(value) == 2
    return is_two and isinstance(value[0], Tensor) and isinstance(value[1], Tensor)


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
        self._seen = Attributes([])
        use = number_use([*layers])
        mixed = {cls: _with_stand_ins(cls) for cls in dict.fromkeys(map(type, layers))}
        for number, layer in enumerate(layers):
            layer.__class__ = mixed[type(layer)]
            # Past `nn.Module.__setattr__`, which is for parameters and modules.
            vars(layer).update(bdlora_stand_ins=self, bdlora_number=number, bdlora_like=None)
        if use:
            self.refuse(f"the layers' code may depend on their number ({use})")
        else:
            self._look()

    def refuse(self, reason: str) -> None:
        """Have every layer traced from now on."""
        self.reason = reason
        self._write([None] * len(self.layers))

    def run(self, forward: Callable[[], Result]) -> Result:
        """Run a forward in which layers stand in; once more without, if its graph shows that they get unlike things.

        Dynamo keeps nothing of a graph that was refused, and nothing of it has run.
        """
        try:
            with self.in_forward():
                return forward()
        except StandInError as unlike:
            self.refuse(str(unlike))
        return forward()

    @contextmanager
    def in_forward(self) -> Iterator[None]:
        """For one forward: look which layers are alike now, and let them stand in."""
        if not self.reason and not self._seen.are_unchanged():
            self._look()
        self.is_active = not self.reason
        try:
            yield
        finally:
            self.is_active = False

    def text(self, traced: int, copied: int) -> str:
        """For the report of a graph."""
        if copied:
            return f"{traced} of {traced + copied} layers; each of the others is like one of these"
        if self.reason:
            return f"every layer: {self.reason}"
        if not self.is_active:
            return "every layer: the forward was not called by `model(...)`, which looks at the layers before"
        if any(layer.bdlora_like is not None for layer in self.layers):
            return "every layer: they have arguments that are not compared"
        return "every layer: none is like one before it, the last not counted"

    def _look(self) -> None:
        """Find anew which layers are alike."""
        if any(vars(layer).get("bdlora_number") != number for number, layer in enumerate(self.layers)):
            self.refuse("the list of layers is not the one that was loaded")
            return
        self._write(self._likes())
        self._seen = Attributes([self.layers])

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
            # A write would have Dynamo look at all its guards again.
            if isinstance(layer, StandInLayer) and layer.bdlora_like != like:
                layer.bdlora_like = like


def _with_stand_ins(cls: type) -> type:
    mixed = type(cls.__name__, (StandInLayer, cls), {"__module__": cls.__module__})
    if "forward" in vars(mixed):
        # transformers wraps it once more in every subclass.
        del mixed.forward  # type: ignore[attr-defined]  # made by `__init_subclass__`
    return mixed


def _not_compiled() -> HollowError:
    return HollowError(
        "decoder layer",
        found="a run outside the bdlora backend",
        expected="a run through `model.compile(backend='bdlora')`: these operators are erased there",
        remedy="call `model.compile(backend='bdlora')`, then `model(...)` or `model.generate(...)`",
    )
