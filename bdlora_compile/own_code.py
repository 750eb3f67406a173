"""Functions that Dynamo traces apart from all others."""

import uuid
from collections.abc import Callable
from types import FunctionType
from typing import Any


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code that no other one has.

    Dynamo keeps compiled graphs, their limit and what it learned of sizes by code: those of an explanation shall not
    count for models that share theirs.
    """
    assert isinstance(function, FunctionType), "a function written in Python"
    code = function.__code__.replace(co_name=f"explained_{uuid.uuid4().hex}")
    return FunctionType(code, function.__globals__, closure=function.__closure__)
