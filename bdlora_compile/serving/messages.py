"""What rank 0 says to those that follow: calls, as bytes in which things that every rank has are names."""

import io
import pickle
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from bdlora_compile.errors import ConfigError
from bdlora_compile.runtime.cache import LocalCache
from bdlora_compile.runtime.leading import Leader
from bdlora_compile.serving.batch import Batch

_DEVICE = "device"
"""Name of each rank's own accelerator."""


class Signal(Enum):
    """Messages that are no calls."""

    BEAT = "rank 0 is alive"
    FAILED = "the last call failed on rank 0"
    END = "rank 0 needs you no more"


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a method of something that every rank has.

    Attributes:
        target: what it is called on.
        method: its name.
        args, kwargs: tensors arrive with their strides, on the receiver's device: graphs are guarded by both.
        grad, inference: torch's modes on rank 0, by which graphs are guarded too.
    """

    target: Any
    method: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    grad: bool
    inference: bool

    def run(self) -> None:
        """Do it here; results are rank 0's business."""
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad):
            getattr(self.target, self.method)(*self.args, **self.kwargs)


Message = Signal | Call


class Writer:
    """Makes bytes of messages, on rank 0: numbers of things that it has no more, and the message itself.

    Args:
        leader: given to what is named, so that its own methods are sent as well.
        fixed: things that all ranks had before, by name.
    """

    def __init__(self, leader: Leader, fixed: Mapping[str, Any]) -> None:
        self._leader = leader
        self._fixed = {id(value): name for name, value in fixed.items()}
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._count = 0
        self._gone: list[int] = []

    def write(self, message: Message) -> bytes:
        """The bytes.

        Raises:
            ConfigError: something in it cannot be sent.
        """
        buffer, gone = io.BytesIO(), self._gone[:]
        pickle.dump(gone, buffer)
        try:
            _Pickler(buffer, self._name).dump(message)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ConfigError(
                "call on rank 0",
                found=f"an argument that cannot be sent to the other ranks ({error})",
                expected="tensors, numbers, texts, and caches of `bdlora_compile.make_cache`",
                remedy="pass what the model's forward needs alone; streamers and criteria belong to `generate`",
            ) from error
        # Finalizers add to this very list, also meanwhile; what could not be sent above is sent with the next message.
        del self._gone[: len(gone)]
        return buffer.getvalue()

    def _name(self, value: Any) -> object:
        """How other ranks call it; None for what is sent by value."""
        if id(value) in self._fixed:
            return self._fixed[id(value)]
        if isinstance(value, torch.device) and value.type != "cpu":
            return _DEVICE
        if not isinstance(value, LocalCache | Batch):
            return None
        if value not in self._numbers:
            if isinstance(value, LocalCache):
                _require_new(value)
                value.leader = self._leader
            self._count += 1
            self._numbers[value] = self._count
            weakref.finalize(value, self._gone.append, self._count)
        return (type(value).__name__, self._numbers[value], *value.arguments)


class Reader:
    """Makes messages of bytes, on the other ranks. What is named for the first time is made then.

    Args:
        makers: by class, what makes this rank's own from its arguments.
        fixed: as the writer's.
        device: where tensors of rank 0's device go.
    """

    def __init__(
        self, makers: Mapping[str, Callable[..., Any]], fixed: Mapping[str, Any], device: torch.device
    ) -> None:
        self._makers = makers
        self._fixed = {**fixed, _DEVICE: device}
        self._made: dict[int, Any] = {}

    def read(self, data: bytes) -> Message:
        """The message; it came over the process group, whose ranks trust each other.

        What rank 0 has no more is forgotten before anything is made, so that memory is used as it is there.
        """
        stream = io.BytesIO(data)
        for number in pickle.load(stream):
            self._made.pop(number, None)
        message: Message = _Unpickler(stream, self._find).load()
        return message

    def _find(self, name: Any) -> Any:
        if isinstance(name, str):
            return self._fixed[name]
        kind, number, *arguments = name
        if number not in self._made:
            self._made[number] = self._makers[kind](*arguments)
        return self._made[number]


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, name: Callable[[Any], object]) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self._name = name

    def persistent_id(self, value: Any) -> Any:
        """What is named and not sent."""
        return self._name(value)

    def reducer_override(self, value: Any) -> Any:
        """Tensors by their bytes; all else as pickle does it."""
        if not isinstance(value, Tensor):
            return NotImplemented
        whole = value.detach().cpu().contiguous()
        data = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
        return tensor_of, (data, value.dtype, tuple(value.shape), value.stride(), value.device)


class _Unpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, find: Callable[[Any], Any]) -> None:
        super().__init__(buffer)
        self._find = find

    def persistent_load(self, name: Any) -> Any:
        """This rank's own of what was named."""
        return self._find(name)


def tensor_of(
    data: bytes, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int], device: torch.device
) -> Tensor:
    """The tensor of these bytes (row-major), with these strides."""
    whole = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    whole = whole.reshape(tuple(shape))
    # A dim that was expanded has one element in memory.
    sizes = [1 if step == 0 else size for size, step in zip(shape, stride, strict=True)]
    for dim, size in enumerate(sizes):
        whole = whole.narrow(dim, 0, min(size, shape[dim]))
    return torch.empty_strided(whole.shape, stride, dtype=dtype, device=device).copy_(whole).expand(tuple(shape))


def _require_new(cache: LocalCache) -> None:
    if cache.is_used:
        raise ConfigError(
            "past_key_values",
            found="a cache that was filled before the other ranks followed",
            expected="one that was made inside `bdlora_compile.follow`",
            remedy="make a new one with `bdlora_compile.make_cache`",
        )
