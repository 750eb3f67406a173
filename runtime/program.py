"""What the backend returns to Dynamo: a compiled graph with this rank's values bound to its placeholders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bdlora_compile.errors import PassError
from bdlora_compile.ir import (
    BankSource,
    CacheSource,
    InputSource,
    MergedSource,
    RankIndices,
    Record,
    Source,
    WeightSource,
)
from bdlora_compile.placement import Mesh, Shard, shard_slice
from bdlora_compile.runtime.deployment import Deployment, RankState

Callee = Callable[..., Any]
CallSource = InputSource | CacheSource
"""What a call brings: an argument, or a layer of the cache that an argument holds."""


@dataclass(frozen=True, slots=True)
class BoundGraph:
    """One rank's graph: constants bound, arguments of the call filled in.

    Attributes:
        run: the graph as a function of all its placeholders.
        values: a bound tensor for each placeholder, or what of a call fills it.
    """

    run: Callee
    values: Sequence[torch.Tensor | CallSource]

    def arguments(self, args: Sequence[Any]) -> list[Any]:
        """Values of all placeholders for a call with ``args``."""
        caches = {index: cache_views(args[index]) for index in self.cache_indices}
        return [_fill(value, args, caches) for value in self.values]

    @property
    def cache_indices(self) -> set[int]:
        """The arguments that are caches."""
        return {value.index for value in self.values if isinstance(value, CacheSource)}


class Program:
    """A graph ready to run on this rank.

    Args:
        deployment: the model's state.
        bound: this rank's graph.
        token_index: the argument whose first two dims are [batch, seq].
    """

    def __init__(self, deployment: Deployment, bound: BoundGraph, token_index: int) -> None:
        self._deployment = deployment
        self._bound = bound
        self._token_index = token_index

    def __call__(self, *args: Any) -> Any:
        """Choose the adapters of the batch, then run."""
        batch, seq = args[self._token_index].shape[:2]
        self._deployment.select(batch, seq)
        return self._bound.run(*self._bound.arguments(args))


def cache_views(store: torch.Tensor) -> Sequence[torch.Tensor]:
    """Keys and values of all layers of a cache [layers, 2, ...]: keys of layer l at 2 l, values at 2 l + 1."""
    return store.flatten(0, 1).unbind()


def _fill(value: torch.Tensor | CallSource, args: Sequence[Any], caches: Mapping[int, Sequence[torch.Tensor]]) -> Any:
    match value:
        case InputSource(index):
            return args[index]
        case CacheSource(index, layer, part):
            return caches[index][2 * layer + part]
        case _:
            return value


def bind(
    records: Sequence[Record], state: RankState, mesh: Mesh, device: torch.device
) -> list[torch.Tensor | CallSource]:
    """What fills each placeholder on one rank: a slice of a weight, a tensor of the bank, or an argument."""
    return [_value(info.source, info, state, mesh, device) for info in records]


def _value(
    source: Source | None, info: Record, state: RankState, mesh: Mesh, device: torch.device
) -> torch.Tensor | CallSource:
    match source:
        case InputSource() | CacheSource():
            return source
        case WeightSource(parameter, _):
            return state.store.get(parameter, info.placement)
        case MergedSource(parts):
            return state.store.get_merged(parts)
        case BankSource(field):
            tensor: torch.Tensor = getattr(state.bank, field.value)
            return tensor
        case RankIndices(length, pieces):
            part = shard_slice((length * pieces,), Shard(0, pieces), state.rank, mesh)
            return torch.arange(part.start, part.stop, device=device)
        case None:
            raise PassError(
                "placeholder",
                found="no source",
                expected="a weight, a tensor of the bank, or an argument",
                remedy="report this: the tag pass has to run first",
            )
