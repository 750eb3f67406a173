"""Localize LoRA paths of graphs that others sharded, where the owner declared a factor block-diagonal.

Column:  Before:  h = all_gather(z_k)                    z_k = x A_k^T [T, R/N];  y_k += h B_k^T          B_k [O/N, R]
         After:   y_k += z_k B_k[:, own]^T               the columns of B_k that are not zero
Row:     Before:  h = all_reduce(x_k A_k^T)              A_k [R, D/N];  y[own columns] += h B_k^T         B_k [O/N, R]
                  y = all_reduce(y)                      or: y = all_reduce(y) + all_gather(h B_k^T)
         After:   y += (x_k A_k[own]^T) B[:, own]^T      the rows of A_k that are not zero; B[:, own] is rebuilt at load
                  y = all_reduce(y)                      or: all_reduce(y) + all_reduce(...), which fold makes one

Sources: S-LoRA arXiv 2311.03285, BD-LoRA arXiv 2510.23346. Legal because the owner declared it (`declared.py`); that
ranks hold what this needs was checked before (`foreign/licences.py`), which can only refuse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch.fx import Graph, Node

from bdlora_compile import collectives
from bdlora_compile.dataflow import concrete, view_sizes
from bdlora_compile.foreign.paths import ColumnPath, Landing, LinearPath, Path, RowPath, parameter_name, path_name
from bdlora_compile.foreign.without import build_rest, rest_without
from bdlora_compile.ir import (
    ArgumentWeight,
    Captured,
    Fact,
    Origin,
    RebuiltSource,
    fake_tensor,
    has_record,
    insert_placeholder,
    record,
    set_record,
)
from bdlora_compile.pass_manager import PassContext, erase_with_operands
from bdlora_compile.placement import Mesh, RankLocal, Replicate
from bdlora_compile.propagation import find_fake_mode
from bdlora_compile.report import PassStats, Refusal

_ATEN = torch.ops.aten


@dataclass(frozen=True, slots=True)
class LocalizeDeclared:
    """Remove the collective between the factors of every path that has its licence.

    Attributes:
        paths: what the tag pass found.
        refused: why paths have no licence after all, by the name of their second factor.
    """

    paths: Sequence[Path]
    refused: dict[str, str]

    name: ClassVar[str] = "localize declared"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.TAGGED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.LORA_LOCAL, Fact.PARTITIONED})

    def rewrite(self, captured: Captured, context: PassContext) -> PassStats:
        graph = captured.graph
        matches, refusals = 0, []
        for path in self.paths:
            name = path_name(path)
            if name in self.refused:
                refusals.append(Refusal(name, self.refused[name]))
                continue
            match path:
                case ColumnPath():
                    _localize_column(graph, path)
                case RowPath():
                    _localize_row(graph, path)
                case LinearPath():
                    # Needs no licence of blocks: `fold` moves its all-reduce.
                    continue
            matches += 1
        for node in graph.nodes:
            if not has_record(node):
                set_record(node, placement=RankLocal(), stage=self.name)
        return PassStats(matches=matches, refusals=refusals)

    def verify(self, captured: Captured, context: PassContext) -> None:
        """Nothing beyond shapes: the values that replace others have theirs."""


def _localize_column(graph: Graph, path: ColumnPath) -> None:
    product = path.product
    with graph.inserting_before(product.node):
        own = path.local
        if path.local_dims != tuple(sorted(path.local_dims)):
            own = graph.call_function(_ATEN.permute.default, (own, list(path.local_dims)))
        own = graph.call_function(_ATEN.reshape.default, (own, [-1, path.width]))
        own = _columns(graph, own, path.local_columns, 1, path.width)
        if not product.data_first:
            own = graph.call_function(_ATEN.t.default, (own,))
        own = _scaled(graph, own, path.scale)
        own = _cast(graph, own, fake_tensor(path.local).dtype, fake_tensor(product.data).dtype)
        size = concrete(fake_tensor(product.factor).shape[product.inner_dim])
        factor = _columns(graph, product.factor, path.factor_columns, product.inner_dim, size)
        made = product.with_operands(graph, own, factor)
    _replace(graph, product.node, made)


def _localize_row(graph: Graph, path: RowPath) -> None:
    rebuilt = _rebuilt_factor(graph, path)
    with graph.inserting_before(path.result.next):
        partial = _own_product(graph, path, rebuilt)
        if path.features_first:
            partial = graph.call_function(_ATEN.t.default, (partial,))
        shaped = graph.call_function(_ATEN.reshape.default, (partial, view_sizes(path.result)))
        if path.landing is Landing.PLACED:
            rest = build_rest(graph, path.result, rest_without(path.second.node, path.result))
            made = shaped if rest is None else graph.call_function(_ATEN.add.Tensor, (rest, shaped))
        else:
            mesh = Mesh(len(path.second_columns), path.group)
            reduced, made = collectives.all_reduce(graph, shaped, mesh)
            site = parameter_name(path.second.parameter)
            for node in (reduced, made):
                set_record(node, placement=Replicate(), origin=Origin.LORA, site=site, stage="localize declared")
    _replace(graph, path.result, made)


def _own_product(graph: Graph, path: RowPath, rebuilt: Node) -> Node:
    """scale (x_k A_k[own]^T) B[:, own]^T, [T, O]."""
    first = path.first
    outer = 1 - first.inner_dim
    factor = _columns(graph, first.factor, path.first_columns, outer, concrete(fake_tensor(first.factor).shape[outer]))
    h = first.with_operands(graph, first.data, factor)
    if not first.data_first:
        h = graph.call_function(_ATEN.t.default, (h,))
    h = _cast(graph, h, fake_tensor(first.node).dtype, fake_tensor(path.second.data).dtype)
    rebuilt = _cast(graph, rebuilt, fake_tensor(path.second.parameter).dtype, fake_tensor(path.second.factor).dtype)
    product = _scaled(graph, graph.call_function(_ATEN.mm.default, (h, rebuilt)), path.scale)
    return _cast(graph, product, fake_tensor(path.second.node).dtype, fake_tensor(path.result).dtype)


def _rebuilt_factor(graph: Graph, path: RowPath) -> Node:
    """The placeholder of B[:, own]^T, [r, O]."""
    parameter = fake_tensor(path.second.parameter)
    source = record(path.second.parameter).source
    assert isinstance(source, ArgumentWeight), "a path's factors are parameters"
    rows = concrete(parameter.shape[1 - path.second_rank_dim])
    with find_fake_mode(graph):
        value = torch.empty(
            len(path.first_columns), rows * len(path.second_columns), dtype=parameter.dtype, device=parameter.device
        )
    rebuilt = RebuiltSource(source.parameter, source.index, path.second_rank_dim, path.second_columns, path.group)
    facts = {"source": rebuilt, "placement": RankLocal(), "stage": "localize declared"}
    return insert_placeholder(graph, f"rebuilt_{source.index}", value, **facts)


def _columns(graph: Graph, value: Node, columns: Sequence[int], dim: int, size: int) -> Node:
    """Some places of a dim of ``size``, as slices: runs of neighbouring places are one slice each."""
    runs: list[list[int]] = [[columns[0], columns[0] + 1]]
    for before, column in pairwise(columns):
        if column == before + 1:
            runs[-1][1] = column + 1
        else:
            runs.append([column, column + 1])
    if runs == [[0, size]]:
        return value
    parts = [graph.call_function(_ATEN.slice.Tensor, (value, dim, start, stop)) for start, stop in runs]
    return parts[0] if len(parts) == 1 else graph.call_function(_ATEN.cat.default, (parts, dim))


def _scaled(graph: Graph, value: Node, scale: float) -> Node:
    return value if scale == 1.0 else graph.call_function(_ATEN.mul.Tensor, (value, scale))


def _cast(graph: Graph, value: Node, have: torch.dtype, wanted: torch.dtype) -> Node:
    return value if have == wanted else graph.call_function(_ATEN._to_copy.default, (value,), {"dtype": wanted})


def _replace(graph: Graph, old: Node, made: Node) -> None:
    """Use ``made`` in place of ``old``, and erase what nothing reads any more."""
    _describe(made, old)
    old.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    erase_with_operands(graph, old)


def _describe(made: Node, old: Node) -> None:
    for key in ("nn_module_stack", "stack_trace"):
        if key in old.meta:
            made.meta[key] = old.meta[key]
