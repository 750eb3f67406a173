"""Weights of coming products are brought into the L2 cache while a finished graph's exchanges and attention run.

    Before:  s, n = bdlora::all_reduce_add_norm(x, ...);         y = linear(n, W)
    After:   s, n = bdlora::all_reduce_add_norm(x, ..., W, L);   y = linear(n, W)
    Before:  cache_write_(keys, ...);        a = attention(q, ...);  y = linear(a, W)
    After:   cache_write_(keys, ..., W, L);  a = attention(q, ...);  y = linear(a, W)

L is how many bytes at most: what was measured to pay on a machine (`Machine.fetch_ahead`). Values do not change.
"""

from collections.abc import Iterator

from torch.fx import Graph, Node

from bdlora_compile.ir import fake_tensor, operator_name, record
from bdlora_compile.lora_nodes import LinearArguments, is_lora_linear
from bdlora_compile.regions import is_boundary
from bdlora_compile.report import PassStats, Refusal

CARRIERS = ("bdlora::all_reduce_add_norm", "bdlora::cache_write_")
"""Operators whose kernels can fetch by the way; their last two arguments are the weight and the limit."""


def fetch_ahead(graph: Graph, limit: int) -> PassStats:
    """Give each operator that can fetch the weight of the next product behind it.

    Args:
        limit: bytes of a weight, at most.

    Returns:
        How many have one, and why others do not.
    """
    refusals = []
    matches = 0
    for carrier in [node for node in graph.nodes if operator_name(node) in CARRIERS]:
        weight = _next_weight(carrier)
        if isinstance(weight, str):
            refusals.append(Refusal(record(carrier).site or carrier.name, weight))
            continue
        carrier.args = (*carrier.args, weight, limit)
        matches += 1
    graph.lint()
    return PassStats(matches, refusals)


def _next_weight(carrier: Node) -> Node | str:
    """The weight of the first product behind an operator, or why there is none to fetch."""
    for node in _behind(carrier):
        if operator_name(node) in CARRIERS:
            return f"{operator_name(node)} comes before the next product"
        if is_boundary(node):
            return "the next product is another layer's"
        weight = _weight_of(node)
        if weight is not None:
            is_there = weight.op == "placeholder" and fake_tensor(weight).ndim == 2
            return weight if is_there else "the next product's second factor is no weight"
    return "no product follows"


def _behind(node: Node) -> Iterator[Node]:
    while node.next.op != "output":
        node = node.next
        yield node


def _weight_of(node: Node) -> Node | None:
    if is_lora_linear(node):
        return LinearArguments.of(node).weight
    if operator_name(node) == "linear":
        weight = node.args[1]
        assert isinstance(weight, Node), "a product's weight is a node"
        return weight
    return None
