"""Find the LoRA paths of a graph that others sharded, by what feeds what, and why what looks like one is none.

    z = product(x, A);  h = collective(z);  y = product(h, B)        anything that moves or scales may stand in between

A path begins and ends with a product of which one operand is made of a parameter alone. Where the elements of z go is
probed (`dataflow.py`), so that the way in which the code was written does not matter. Names do not matter either. The
pass writes records and changes nothing; what its owner declared of a factor is checked when the path is rewritten.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, Node

from bdlora_compile.collectives import ALL_GATHER, ALL_REDUCE, WAIT, is_collective
from bdlora_compile.dataflow import NotFollowedError, cone, linear_origin, linear_reach
from bdlora_compile.declared import BlockDiagonal
from bdlora_compile.foreign.match_column import match_column
from bdlora_compile.foreign.match_row import match_row
from bdlora_compile.foreign.paths import (
    GroupMember,
    LinearPath,
    Path,
    Product,
    parameter_name,
    product_of,
    products,
)
from bdlora_compile.ir import ArgumentWeight, Captured, Fact, Origin, operator_name, record, set_record
from bdlora_compile.pass_manager import PassContext
from bdlora_compile.report import PassStats, Refusal


@dataclass(frozen=True, slots=True)
class TagPaths:
    """Find paths.

    Attributes:
        groups: this rank in each process group of the graph, by the group's name.
        found: the paths, in graph order; written by the pass.
    """

    groups: Mapping[str, GroupMember]
    found: list[Path]

    name: ClassVar[str] = "tag paths"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.TAGGED})

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        refusals: list[Refusal] = []
        considered: set[Node] = set()
        self.found.clear()
        for product in products(captured.graph):
            wait = _collective_behind(product)
            if wait is None:
                continue
            considered.add(wait)
            _mark_lora([wait, *wait.all_input_nodes], product)
            try:
                self.found.append(self._match(product, wait))
            except NotFollowedError as reason:
                refusals.append(Refusal(parameter_name(product.parameter), str(reason)))
        refusals += _declared_in_vain(captured.graph, self.found, considered)
        return PassStats(matches=len(self.found), refusals=refusals)

    def verify(self, captured: Captured, context: PassContext) -> None:
        """Nothing beyond shapes: the pass writes records only."""

    def _match(self, product: Product, wait: Node) -> Path:
        collective = wait.all_input_nodes[0]
        member = self.groups[str(collective.args[-1])]
        if operator_name(collective) == ALL_GATHER:
            return match_column(product, wait, member)
        if operator_name(collective) == ALL_REDUCE and collective.args[1] == "sum":
            row = match_row(product, wait, member)
            if row is not None:
                # A gather of the result is the path's own too.
                _mark_lora([node for node in cone(product.node, row.result) if _is_communication(node)], product)
            return row or LinearPath(product, wait)
        raise NotFollowedError(f"the collective between its factors is {operator_name(collective)}")


def _collective_behind(product: Product) -> Node | None:
    """The wait of the one collective that a product's data is made of, None if there is more to it."""
    origin = linear_origin(product.data)
    if len(origin) != 1 or operator_name(origin[0]) != WAIT:
        return None
    operand = origin[0].all_input_nodes[0].args[0]
    assert isinstance(operand, Node), "a collective is of a value of the graph"
    # Between two products: a whole activation that a layer gathers or sums is no LoRA path, unless its owner says so.
    begins = linear_origin(operand)
    is_low_rank = bool(begins) and all(product_of(node) is not None for node in begins)
    return origin[0] if is_low_rank or _is_declared(product) else None


def _is_communication(node: Node) -> bool:
    return is_collective(node) or operator_name(node) == WAIT


def _mark_lora(nodes: Sequence[Node], product: Product) -> None:
    for node in nodes:
        set_record(node, origin=Origin.LORA, site=parameter_name(product.parameter))


def _declared_in_vain(graph: Graph, found: Sequence[Path], considered: Set[Node]) -> list[Refusal]:
    """Declared factors of which no path was found at all, and what stands in the way."""
    licensed = {path.licence.parameter for path in found if not isinstance(path, LinearPath)}
    refusals = []
    for product in products(graph):
        if _is_declared(product) and product.parameter not in licensed:
            reason = _before_second_factor(product, considered) or _behind_first_factor(product, considered)
            refusals += [Refusal(parameter_name(product.parameter), reason)] if reason else []
    return refusals


def _is_declared(product: Product) -> bool:
    source = record(product.parameter).source
    return isinstance(source, ArgumentWeight) and isinstance(source.declared, BlockDiagonal)


def _before_second_factor(product: Product, considered: Set[Node]) -> str:
    """What stands between a gather and the product that its owner declared to read it."""
    origin = [node for node in linear_origin(product.data) if operator_name(node) != WAIT]
    pending, seen = list(origin), set(origin)
    while pending:
        node = pending.pop()
        is_gather = operator_name(node) == WAIT and operator_name(node.all_input_nodes[0]) == ALL_GATHER
        if is_gather and node not in considered:
            return f"{origin[0].name} ({operator_name(origin[0])}) stands between it and the gather"
        if operator_name(node) not in ("mm", WAIT) or node in origin:
            pending += [operand for operand in node.all_input_nodes if operand not in seen]
            seen.update(node.all_input_nodes)
    return ""


def _behind_first_factor(product: Product, considered: Set[Node]) -> str:
    """What reads the sum over ranks of a product before a second product does."""
    _, readers = linear_reach(product.node)
    if len(readers) != 1 or operator_name(readers[0]) != ALL_REDUCE:
        return ""
    (wait,) = readers[0].users
    _, behind = linear_reach(wait)
    if wait in considered or not behind:
        return ""
    return f"{behind[0].name} ({operator_name(behind[0])}) reads the sum of its product before a second factor does"
