"""LoRA paths of a finished graph of GPUs, and how each is put beside its base product.

For few tokens alone: that is known when the graph runs, so who makes a delta and who adds it ask the same question
(`linear_op.has_delta`).
"""

import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from bdlora_compile.ir import Origin, fake_tensor, operator_name, record, set_record
from bdlora_compile.lora_nodes import (
    ApplyArguments,
    ExpandInPlaceArguments,
    LinearArguments,
    LinearBesideArguments,
    LinearBridgedArguments,
    ShrinkGroupedArguments,
    is_lora_linear,
    is_product_of,
    weight_and_bias,
)
from bdlora_compile.pass_manager import erase_with_operands

_REDUCE = "bdlora::all_reduce"
_APART = "its product and LoRA are two operators"
_OTHER_BRIDGE = "what lies between its factors is not one all-reduce through symmetric memory"
_OTHER_PRODUCT = "its product reads another operand"
_OTHER_COLUMNS = "its sites do not write all columns of their product"


class Path(ABC):
    """A product with its LoRA; ``label`` is what reports call it."""

    label: str

    @property
    @abstractmethod
    def arguments(self) -> LinearArguments | ExpandInPlaceArguments:
        """Of the operator that adds LoRA."""

    @property
    @abstractmethod
    def y(self) -> Node:
        """The result."""

    @property
    @abstractmethod
    def readers(self) -> list[Node]:
        """Who reads it, but for the path itself."""

    @abstractmethod
    def put_beside(self, graph: Graph) -> tuple[Node, Node]:
        """Rewrite the path: (the product, which for few tokens lacks LoRA; what it lacks).

        Whoever reads the product must be rewritten next.
        """

    @property
    def num_sites(self) -> int:
        """Products that lie side by side in it."""
        return len(self.arguments.sites)

    @property
    def token_slot(self) -> Node:
        """Each token's slot."""
        return self.arguments.token_slot


@dataclass(frozen=True, slots=True)
class LocalPath(Path):
    """One operator, `lora_linear`."""

    product: Node
    label: str

    @property
    def y(self) -> Node:
        """The operator's result."""
        return self.product

    @property
    def arguments(self) -> LinearArguments:
        """Of the operator."""
        return LinearArguments.of(self.product)

    @property
    def readers(self) -> list[Node]:
        """Who reads the result."""
        return [*self.y.users]

    def put_beside(self, graph: Graph) -> tuple[Node, Node]:
        """By `lora_linear_beside`."""
        with graph.inserting_before(self.product):
            pair = LinearBesideArguments.taken_from(self.arguments).insert(graph)
        y, delta = _results(graph, pair, self.product, self.label)
        self.product.replace_all_uses_with(y)
        graph.erase_node(self.product)
        return y, delta


@dataclass(frozen=True, slots=True)
class BridgedPath(Path):
    """A product, and LoRA with an all-reduce between its factors, added in place (S-LoRA)."""

    expand: Node
    label: str

    @property
    def arguments(self) -> ExpandInPlaceArguments:
        """Of the second half."""
        return ExpandInPlaceArguments.of(self.expand)

    @property
    def y(self) -> Node:
        """The product."""
        return self.arguments.y

    @property
    def readers(self) -> list[Node]:
        """Who reads the result."""
        return [node for node in self.y.users if node is not self.expand]

    def put_beside(self, graph: Graph) -> tuple[Node, Node]:
        """By `lora_linear_bridged`."""
        known, product = self.arguments, self.y
        first, (_, buffer, one_shot, two_shot, group) = _shrink_of(known), known.h.args
        weight, bias = weight_and_bias(product)
        more: dict[str, Any] = {"weight": weight, "bias": bias, "parts": known.parts, "part": first.part or 0}
        more |= {"buffer": buffer, "one_shot": one_shot, "two_shot": two_shot, "group": group}
        # Nobody reads the product before LoRA is added to it.
        with graph.inserting_before(self.expand):
            pair = LinearBridgedArguments.taken_from(known, first, **more).insert(graph)
        y, delta = _results(graph, pair, product, self.label)
        graph.erase_node(self.expand)
        product.replace_all_uses_with(y)
        for node in (product, known.h):
            erase_with_operands(graph, node)
        return y, delta


def _shrink_of(known: ExpandInPlaceArguments) -> ShrinkGroupedArguments:
    return ShrinkGroupedArguments.of(known.h.all_input_nodes[0])


def _results(graph: Graph, pair: Node, product: Node, label: str) -> tuple[Node, Node]:
    """(y, delta) of an operator that takes a product's place."""
    with graph.inserting_after(pair):
        delta = graph.call_function(operator.getitem, (pair, 1))
        y = graph.call_function(operator.getitem, (pair, 0))
    stack = product.meta.get("nn_module_stack")
    pair.meta, delta.meta["nn_module_stack"], y.meta = {"nn_module_stack": stack}, stack, dict(product.meta)
    set_record(pair, placement=record(product).placement, site=label, stage="emit")
    set_record(delta, origin=Origin.LORA, site=label, stage="emit")
    return y, delta


def paths_of(graph: Graph) -> tuple[list[Path], dict[str, str]]:
    """(paths that can be put beside, in their order; the labels of others, and why they cannot)."""
    found: list[Path] = []
    others: dict[str, str] = {}
    for node in graph.nodes:
        if ApplyArguments.is_of(node):
            others[_label(node)] = _APART
        path = _path(node)
        if path is not None and (reason := _obstacle(path)):
            others[path.label] = reason
        elif path is not None:
            found.append(path)
    return found, others


def _path(node: Node) -> Path | None:
    """The path whose LoRA a node adds, by itself or as one operator with the product."""
    if is_lora_linear(node):
        return LocalPath(node, _label(node))
    return BridgedPath(node, _label(node)) if ExpandInPlaceArguments.is_of(node) else None


def _obstacle(path: Path) -> str:
    """Why a path cannot be put beside its product; empty if it can."""
    known = path.arguments
    if path.num_sites > 1 and sum(known.out_features) != int(fake_tensor(path.y).shape[-1]):
        return _OTHER_COLUMNS
    if isinstance(known, LinearArguments):
        return ""
    if operator_name(known.h) != _REDUCE or not ShrinkGroupedArguments.is_of(known.h.all_input_nodes[0]):
        return _OTHER_BRIDGE
    first = _shrink_of(known)
    fits = is_product_of(known.y, first.x) and (first.parts or 1) == known.parts
    return "" if fits else _OTHER_PRODUCT


def _label(node: Node) -> str:
    return record(node).site or node.name
