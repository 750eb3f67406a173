"""What everybody needs who has Dynamo trace a function for this package."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch._dynamo.exc import BackendCompilerFailed

from bdlora_compile.errors import BdloraError


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code that no other one has.

    Dynamo keeps compiled graphs, their limit and what it learned of sizes by code: those of an explanation shall not
    count for models that share theirs.
    """
    assert isinstance(function, FunctionType), "a function written in Python"
    code = function.__code__.replace(co_name=f"explained_{uuid.uuid4().hex}")
    return FunctionType(code, function.__globals__, closure=function.__closure__)


@contextmanager
def own_errors() -> Iterator[None]:
    """Errors of our own as themselves: Dynamo wraps what a backend raises, the reader wants the error."""
    try:
        yield
    except BackendCompilerFailed as failure:
        if isinstance(failure.inner_exception, BdloraError):
            raise failure.inner_exception from None
        raise
