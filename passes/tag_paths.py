"""Find the LoRA paths of a graph that others sharded, by what feeds what, and why what looks like one is none.

    z = product(x, A);  h = collective(z);  y = product(h, B)        anything that moves or scales may stand in between

A path begins and ends with a product of which one operand is made of a parameter alone. Where the elements of z go is
probed (`dataflow.py`), so that the way in which the code was written does not matter. Names do not matter either. The
pass writes records and changes nothing; what its owner declared of a factor is checked when the path is rewritten.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from bdlora_compile.collectives import ALL_GATHER, ALL_REDUCE, WAIT
from bdlora_compile.dataflow import NotFollowedError, linear_origin
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
from bdlora_compile.ir import Captured, Fact, Origin, operator_name, set_record
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
        self.found.clear()
        for product in products(captured.graph):
            wait = _collective_behind(product)
            if wait is None:
                continue
            _mark_lora(wait, product)
            try:
                self.found.append(self._match(product, wait))
            except NotFollowedError as reason:
                refusals.append(Refusal(parameter_name(product.parameter), str(reason)))
        return PassStats(matches=len(self.found), refusals=refusals)

    def verify(self, captured: Captured, context: PassContext) -> None:
        """Nothing beyond shapes: the pass writes records only."""

    def _match(self, product: Product, wait: Node) -> Path:
        collective = wait.all_input_nodes[0]
        member = self.groups[str(collective.args[-1])]
        if operator_name(collective) == ALL_GATHER:
            return match_column(product, wait, member)
        if operator_name(collective) == ALL_REDUCE and collective.args[1] == "sum":
            return match_row(product, wait, member) or LinearPath(product, wait)
        raise NotFollowedError(f"the collective between its factors is {operator_name(collective)}")


def _collective_behind(product: Product) -> Node | None:
    """The wait of the one collective that a product's data is made of, None if there is more to it."""
    origin = linear_origin(product.data)
    if len(origin) != 1 or operator_name(origin[0]) != WAIT:
        return None
    operand = origin[0].all_input_nodes[0].args[0]
    assert isinstance(operand, Node), "a collective is of a value of the graph"
    # Between two products: a whole activation that a layer gathers or sums is no LoRA path.
    begins = linear_origin(operand)
    return origin[0] if begins and all(product_of(node) is not None for node in begins) else None


def _mark_lora(wait: Node, product: Product) -> None:
    for node in (wait, *wait.all_input_nodes):
        set_record(node, origin=Origin.LORA, site=parameter_name(product.parameter))
