"""What nodes and sizes are called in reports and on the inspector's page, in every process alike.

A key is ``<module path>/<operator>``, with ``#2``, ``#3`` behind it for the second and third of them. A node gets it
when it is first seen and keeps it through all passes, so two stages are compared by what a node *is*, not
by the name that FX gave it in one of them.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import count

import torch
from torch.fx import Graph, Node

from bdlora_compile.ir import (
    ArgumentWeight,
    Captured,
    InputSource,
    MergedSource,
    WeightSource,
    fake_value,
    module_path,
    node_key,
    operator_name,
    plain_path,
    record,
    set_node_key,
)
from bdlora_compile.printer import source_text, type_text


def name_nodes(graph: Graph) -> dict[Node, str]:
    """The stable key of each node; those that have none get one, and keep it."""
    keys: dict[Node, str] = {}
    taken: set[str] = set()
    nameless: list[Node] = []
    for node in graph.nodes:
        key = node_key(node)
        # A node that was copied from another one brought its key with it.
        if not key or key in taken:
            nameless.append(node)
        else:
            keys[node] = key
            taken.add(key)
    counters: dict[str, Iterable[int]] = {}
    for node in nameless:
        base = _base_of_key(node)
        key = base
        numbers = counters.setdefault(base, count(2))
        while key in taken:
            key = f"{base}#{next(iter(numbers))}"
        taken.add(key)
        keys[node] = key
        set_node_key(node, key)
    return keys


def symbol_names(captured: Captured) -> dict[str, str]:
    """Names of symbolic sizes: ``batch`` and ``seq`` of the forward's tokens, ``s0``, ``s1`` in order for others.

    A process numbers its symbols as it likes: names in reports must not depend on it.
    """
    names: dict[str, str] = {}
    value = fake_value(captured.token_input) if captured.token_input is not None else None
    if isinstance(value, torch.Tensor):
        for size, name in zip(value.shape[:2], ("batch", "seq"), strict=False):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                names.setdefault(str(size.node.expr), name)
    for node in captured.graph.nodes:
        for symbol in re.findall(r"\b[su]\d+\b", type_text(fake_value(node))):
            names.setdefault(symbol, f"s{sum(name.startswith('s') and name != 'seq' for name in names.values())}")
    return names


def renamed(names: Mapping[str, str]) -> Callable[[str], str]:
    """A function that puts names in place of a process's own symbols in a text."""
    pattern = re.compile(r"\b[su]\d+\b")
    return lambda text: pattern.sub(lambda found: names.get(found[0], found[0]), text)


def _base_of_key(node: Node) -> str:
    if node.op == "placeholder":
        return f"in/{argument_path(node)}"
    if node.op == "output":
        return "out"
    return f"{module_path(node)}/{operator_name(node)}"


def argument_path(node: Node) -> str:
    """Path of the parameter that a placeholder stands for, or what else tells it from the others."""
    source = record(node).source
    match source:
        case WeightSource(parameter, _) | ArgumentWeight(_, parameter, _):
            return parameter
        case MergedSource(parts):
            return "+".join(name for name, _ in parts)
        case None:
            pass
        case InputSource(index):
            return f"argument {index}" if weight_path(node) is None else str(weight_path(node))
        case _:
            return source_text(source, node)
    return weight_path(node) or ("size" if isinstance(fake_value(node), torch.SymInt) else str(node.target))


def weight_path(node: Node) -> str | None:
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None or isinstance(fake_value(node), torch.SymInt):
        return None
    name = source.name if isinstance(source.name, str) else source.name()
    return plain_path(name) or None
