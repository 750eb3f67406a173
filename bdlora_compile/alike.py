"""Which decoder layers of a model are alike before anything is traced: same classes, same attributes, same shapes.

Layers are alike if Python could not tell them apart but by their weights and by ``layer_idx``, and if their code reads
that number only to say which part of a cache it updates. What cannot be compared makes a layer unlike all others.
"""

import ast
import gc
import inspect
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from enum import Enum
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bdlora_compile.hollow import guards, tag_of

_NUMBER = "layer_idx"
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, Enum)
_LIBRARY = ("torch.", "builtins", "bdlora_compile.")


def kind_of(layer: nn.Module, path: str, number: int, ignored: frozenset[str]) -> Hashable:
    """What a layer is without its weights and its number: equal for layers that are alike.

    Args:
        path: of the layer in the model.
        number: in the list of layers.
        ignored: attributes of the layer itself that say nothing of what it computes.
    """
    parts: list[Hashable] = []
    for name, module in layer.named_modules():
        own = f"{path}.{name}".rstrip(".")
        skipped = ignored if module is layer else ()
        state = [_attribute(key, value, own, path, number) for key, value in vars(module).items() if key not in skipped]
        parts.append((name, type(module), tuple(state)))
    return tuple(parts)


class Attributes:
    """What the modules of some layers held at one time, to see quickly that nothing was changed since.

    A change inside of a list or a deeper object is not seen: `kind_of` calls layers alike only if they share it.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        own = [vars(module) for layer in layers for module in layer.modules()]
        inner = [value for held in own for value in held.values() if isinstance(value, dict)]
        self._empty = [held for held in inner if not held]
        self._filled = [*own, *(held for held in inner if held)]
        # Kept: what is alive shares its identity with nothing.
        self._values = self._now()
        self._ids = [*map(id, self._values)]

    def are_unchanged(self) -> bool:
        """Whether every attribute is the object that it was."""
        return not any(self._empty) and [*map(id, self._now())] == self._ids

    def _now(self) -> list[object]:
        return [*chain.from_iterable(held.values() for held in self._filled)]


def _attribute(key: str, value: Any, own: str, path: str, number: int) -> Hashable:
    if key == _NUMBER and type(value) is int and value == number:
        return "own number"
    if key == "_parameters":
        return tuple((name, _parameter(parameter, path)) for name, parameter in value.items())
    if key == "_modules":
        # The modules themselves are looked at one by one.
        return tuple((name, module is None) for name, module in value.items())
    if isinstance(value, dict):
        return (key, tuple((None if "hooks" in key else _plain(name), _plain(one, own)) for name, one in value.items()))
    return (key, _plain(value))


def _parameter(parameter: Tensor | None, path: str) -> Hashable:
    if parameter is None:
        return None
    tag = tag_of(parameter)
    if tag is None:
        return id(parameter)
    # Weights shared inside of a layer have one name; one of another layer keeps its own.
    return (tag.name.removeprefix(f"{path}."), parameter.shape, parameter.dtype, parameter.requires_grad)


def _plain(value: Any, own: str = "") -> Hashable:
    """Plain values by what they are, all others by which they are."""
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, tuple):
        return (type(value), tuple(_plain(item) for item in value))
    if isinstance(value, (set, frozenset)) and not value:
        return type(value)
    return "guard of its module" if own and guards(value, own) else id(value)


def number_use(layers: Sequence[nn.Module]) -> str:
    """Where the layers' code does more with a layer's number than name a part of a cache; empty if nowhere.

    All functions of the files that the layers' classes are written in are read, not what these call elsewhere.
    """
    classes = dict.fromkeys(type(module) for layer in layers for module in layer.modules())
    owners = dict.fromkeys(
        base for cls in classes for base in cls.__mro__ if not f"{base.__module__}.".startswith(_LIBRARY)
    )
    for file in dict.fromkeys(base.__module__ for base in owners):
        try:
            tree = _parsed(inspect.getsource(sys.modules[file]))
        except (KeyError, OSError, TypeError, SyntaxError):
            return f"{file}: no source to read"
        names = {base.__name__ for base in owners if base.__module__ == file}
        foreign = next((name for base in owners for name in _from_elsewhere(base)), None)
        if foreign is not None:
            return f"{foreign}, which is of another file"
        is_base = all(cls.__module__ != file for cls in classes)
        line = next(_suspects(tree, names, is_base), None)
        if line is not None:
            return f"{file}, line {line}"
    return ""


def _parsed(source: str) -> ast.Module:
    """The tree of a source, while the collector rests.

    CPython 3.11 counts the depth of all its parsers in one place: an object that is collected meanwhile, and whose end
    parses something itself (a traceback that is formatted does), makes this parser fail with a SystemError.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if was_enabled:
            gc.enable()


def _from_elsewhere(cls: type) -> Iterator[str]:
    """Methods that somebody else put into the class: its file does not show them."""
    for name, member in vars(cls).items():
        if inspect.isfunction(member) and inspect.unwrap(member).__module__ != cls.__module__:
            yield f"{cls.__name__}.{name}"


def _suspects(tree: ast.Module, classes: set[str], is_base: bool) -> Iterator[int]:
    """Lines that read a layer's number other than for a cache, or, in the layers' ``classes``, that keep something.

    A file that has bases of the layers' classes alone (``is_base``) has other classes for other models.
    """
    for node in tree.body:
        is_own = isinstance(node, ast.ClassDef) and node.name in classes
        if is_own or not (is_base and isinstance(node, ast.ClassDef)):
            yield from _lines(node, is_own)


def _lines(node: ast.AST, is_own: bool) -> Iterator[int]:
    if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__init_subclass__"):
        return
    if isinstance(node, ast.Attribute):
        is_kept = is_own and not isinstance(node.ctx, ast.Load)
        if node.attr == _NUMBER or is_kept:
            yield node.lineno
    if isinstance(node, ast.Constant) and node.value == _NUMBER:
        yield node.lineno
    if is_own and isinstance(node, (ast.Global, ast.Nonlocal)):
        yield node.lineno
    for child in ast.iter_child_nodes(node):
        if not _names_cache(node, child):
            yield from _lines(child, is_own)


def _names_cache(call: ast.AST, argument: ast.AST) -> bool:
    """Whether ``argument`` is the layer's number in ``cache.update(k, v, self.layer_idx)``."""
    return (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "update"
        and argument in call.args
        and isinstance(argument, ast.Attribute)
        and argument.attr == _NUMBER
    )
