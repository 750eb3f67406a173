"""Placeholders of values that a rank brings itself: tensors of its adapter bank, its cache, indices that it owns."""

from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from bdlora_compile.ir import (
    BankField,
    BankSource,
    CacheSource,
    InputSource,
    RankIndices,
    Source,
    fake_tensor,
    insert_placeholder,
    record,
    set_record,
)
from bdlora_compile.placement import Placement
from bdlora_compile.plan import ModelPlan
from bdlora_compile.propagation import find_fake_mode
from bdlora_compile.runtime.ops import SlotField


@dataclass(slots=True)
class RankInputs:
    """The placeholders that partitioning adds to a graph, one for each source."""

    graph: Graph
    plan: ModelPlan
    _nodes: dict[Source, Node] = field(default_factory=dict)

    def indices(self, length: int, pieces: int) -> Node:
        """Indices int64 [length] of the piece that the rank owns, of a dim cut into ``pieces``."""
        return self._node(RankIndices(length, pieces))

    def bank(self, bank_field: BankField, layer: str | None) -> Node:
        """A tensor of the bank. A table has rows for every site: a layer (a module path) sees its own."""
        is_table = bank_field in (BankField.SLOTS, BankField.SCALES)
        return self._node(BankSource(bank_field, layer if is_table else None))

    def cache(self, store: object, layer: object, part: int, cut: Placement) -> Node:
        """One layer's keys (``part`` 0) or values (1) of the cache that the argument ``store`` is."""
        assert isinstance(store, Node), "a cache is an input of the graph"
        assert isinstance(layer, int), "the layer is a literal"
        argument = record(store).source
        assert isinstance(argument, InputSource), "a cache is an argument"
        source = CacheSource(argument.index, layer, part)
        if source not in self._nodes:
            with find_fake_mode(self.graph):
                whole = fake_tensor(store)
                # Not a view of the store: layers do not overlap, and Inductor would guard against it by copies.
                value = torch.empty(whole.shape[2:], dtype=whole.dtype, device=whole.device)
                self._insert(source, value)
            set_record(self._nodes[source], placement=cut)
        return self._nodes[source]

    def _node(self, source: Source) -> Node:
        if source not in self._nodes:
            with find_fake_mode(self.graph):
                self._insert(source, _source_value(source, self.plan))
        return self._nodes[source]

    def _insert(self, source: Source, value: torch.Tensor) -> None:
        self._nodes[source] = insert_placeholder(
            self.graph, _source_name(source), value, source=source, stage="partition"
        )


def _source_name(source: Source) -> str:
    match source:
        case BankSource(bank_field, layer):
            return f"bank_{bank_field.value}" + (f"_{layer.replace('.', '_')}" if layer else "")
        case CacheSource(_, layer, part):
            return f"cache_{('keys', 'values')[part]}_{layer}"
        case RankIndices(length, pieces):
            return f"own_indices_{length}_of_{pieces}"
        case _:
            raise AssertionError(f"{source} is captured, never made")


def _source_value(source: Source, plan: ModelPlan) -> torch.Tensor:
    """A value of the right dtype and shape; banks' own sizes are fixed at load and do not matter to shapes."""
    num_sites = max(len(plan.sites), 1)
    match source:
        case BankSource(BankField.POOL, _):
            return torch.empty(1, dtype=plan.dtype, device=plan.device)
        case BankSource(BankField.SLOTS, _):
            return torch.empty(num_sites, 1, len(SlotField), dtype=torch.int64, device=plan.device)
        case BankSource(BankField.SCALES, _):
            return torch.empty(num_sites, 1, device=plan.device)
        case BankSource(BankField.TOKEN_SLOT, _):
            return torch.empty(1, dtype=torch.int32, device=plan.device)
        case RankIndices(length, _):
            return torch.empty(length, dtype=torch.int64, device=plan.device)
        case _:
            raise AssertionError(f"{source} is captured, never made")
