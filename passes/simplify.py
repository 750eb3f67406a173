"""Take out of a graph what moves nothing, so that two ways to write the same thing look the same.

    Before:  copy(a, b)                                   b                of the same shape and dtype
             view(view(x, s), t)                          view(x, t)
             view(x, s) twice                             the first one
             slice_scatter(x, slice(x, 2, 8, 16), 2, 8, 16)   x            a write of what is there already

Graphs that others wrote come through functionalization, which leaves such chains where code wrote in place.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from bdlora_compile.dataflow import MOVES
from bdlora_compile.ir import Captured, Fact, fake_tensor, is_tensor, operator_name
from bdlora_compile.pass_manager import PassContext, erase_unused
from bdlora_compile.propagation import value_key
from bdlora_compile.report import PassStats

_VIEWS = frozenset({"view", "_unsafe_view"})
_PURE = MOVES | {"copy", "slice_scatter", "empty", "empty_like", "new_empty"}


@dataclass(frozen=True, slots=True)
class Simplify:
    """Erase moves that move nothing."""

    name: ClassVar[str] = "simplify"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        graph, known = captured.graph, dict[object, Node]()
        moves = [node for node in graph.nodes if node.op == "call_function" and is_tensor(node)]
        matches = 0
        for node in moves:
            same = _same(node, known)
            if same is not None:
                node.replace_all_uses_with(same)
                matches += 1
        # Pure operators all: what nobody reads does nothing.
        erase_unused(graph, [node for node in moves if operator_name(node) in _PURE])
        return PassStats(matches=matches)

    def verify(self, captured: Captured, context: PassContext) -> None:
        """Nothing beyond shapes: every value is still computed as it was."""


def _same(node: Node, known: dict[object, Node]) -> Node | None:
    """The earlier value that a node is the same as, None if there is none."""
    if operator_name(node) == "copy":
        return _source(node)
    if operator_name(node) == "slice_scatter":
        return node.all_input_nodes[0] if _writes_what_is_there(node) else None
    whole = _shorten_view(node) if operator_name(node) in _VIEWS else None
    return whole or _same_as_before(node, known)


def _source(copy: Node) -> Node | None:
    """What ``copy(a, b)`` is, if b needs no conversion."""
    source = copy.args[1]
    return source if isinstance(source, Node) and _alike(source, copy) else None


def _alike(a: Node, b: Node) -> bool:
    """Whether two values have the same shape and dtype."""
    first, second = fake_tensor(a), fake_tensor(b)
    return first.dtype == second.dtype and value_key(tuple(first.shape)) == value_key(tuple(second.shape))


def _same_as_before(node: Node, known: dict[object, Node]) -> Node | None:
    if operator_name(node) not in MOVES:
        return None
    key = (node.target, repr(node.args), repr(node.kwargs))
    return None if known.setdefault(key, node) is node else known[key]


def _shorten_view(view: Node) -> Node | None:
    """Make a view of a view one of the first value; that value itself if it has the shape already."""
    source = view.args[0]
    assert isinstance(source, Node), f"{view.name}: a view is of a tensor"
    while operator_name(source) in _VIEWS:
        view.replace_input_with(source, before := source.all_input_nodes[0])
        source = before
    return source if _alike(source, view) else None


def _writes_what_is_there(scatter: Node) -> bool:
    target, written = scatter.args[:2]
    is_slice = isinstance(written, Node) and operator_name(written) == "slice"
    return is_slice and isinstance(written, Node) and written.args == (target, *scatter.args[2:])
