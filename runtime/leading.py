"""The hook by which a call on rank 0 is made on the other ranks as well, while they follow (`serving.following`)."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from bdlora_compile.errors import LostRankError

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Leader(Protocol):
    """What rank 0 has while others follow.

    Attributes:
        lost: why the others cannot be reached any more, None while they can.
    """

    lost: LostRankError | None

    def run(self, method: Callable[..., _T], target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _T:
        """``method(target, *args, **kwargs)`` here, and on every other rank with its own target and tensors."""
        ...


class Led(Protocol):
    """Something that every rank has one of, and of which rank 0 alone is called while others follow."""

    @property
    def leader(self) -> Leader | None:
        """None while every rank makes its own calls, or if there is one rank."""
        ...


_Self = TypeVar("_Self", bound=Led)


def led(method: Callable[Concatenate[_Self, _P], _T]) -> Callable[Concatenate[_Self, _P], _T]:
    """A method that must run on all ranks or on none. Its arguments are sent; results stay where they were made."""

    @wraps(method)
    def call(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        leader = self.leader
        return method(self, *args, **kwargs) if leader is None else leader.run(method, self, args, kwargs)

    return call
