"""Errors this package raises: one small family, one shape of message.

Every message reads ``where: found X, expected Y; do Z``: it names the thing, what was found there, what was
expected, and what to do about it.
"""


class BdloraError(Exception):
    """Base of all errors raised by bdlora_compile.

    Args:
        where: what the error is about (a file, a field, a tensor, a node, a call).
        found: what was found there.
        expected: what was expected instead.
        remedy: what the reader should do, an imperative.
    """

    def __init__(self, where: str, *, found: str, expected: str, remedy: str) -> None:
        self.where = where
        self.found = found
        self.expected = expected
        self.remedy = remedy
        super().__init__(f"{where}: found {found}, expected {expected}; {remedy}")


def first_line(error: Exception) -> str:
    """What another library's error says, short enough to be part of one of ours."""
    return (str(error).splitlines() or [""])[0][:300]


class AdapterError(BdloraError):
    """An adapter (its configuration, its tensors or its name) cannot be served; nothing was changed."""


class ConfigError(BdloraError):
    """An option or an argument has a value that this package cannot honour."""


class HollowError(BdloraError):
    """A model whose weights live in the shards was run, copied or saved by some other way than the backend."""


class PlacementError(BdloraError):
    """A value of the graph cannot be placed on the ranks as the model, the mesh or strict mode demand."""


class PassError(BdloraError):
    """A compiler pass was called without what it requires, or left a graph that does not verify."""


class AgreementError(BdloraError):
    """The ranks of the process group differ in something they must have in common, or one is lost."""


class UnknownAdapterError(AdapterError):
    """A name that stands for no adapter."""


class RequestError(BdloraError):
    """A request cannot be served as it is: a parameter, a prompt or a length is out of range."""


class QueueFullError(BdloraError):
    """As many requests wait as may; nothing was changed, and the same request may be served later."""


class EngineClosedError(BdloraError):
    """The engine takes no requests: it was not started, it drains, or it is closed."""


class LostRankError(AgreementError):
    """A rank died, hangs, or failed where the others did not; the model cannot be used any more."""
