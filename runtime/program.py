"""What the backend returns to Dynamo: a compiled graph with this rank's values bound to its placeholders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bdlora_compile.errors import PassError
from bdlora_compile.ir import BankSource, InputSource, RankIndices, Record, Source, WeightSource
from bdlora_compile.placement import Mesh, Shard, shard_slice
from bdlora_compile.runtime.deployment import Deployment, RankState

Callee = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class BoundGraph:
    """One rank's graph: constants bound, arguments of the call filled in.

    Attributes:
        run: the graph as a function of all its placeholders.
        values: a bound tensor for each placeholder, or the input that fills it.
    """

    run: Callee
    values: Sequence[torch.Tensor | InputSource]

    def arguments(self, args: Sequence[Any]) -> list[Any]:
        """Values of all placeholders for a call with ``args``."""
        return [args[value.index] if isinstance(value, InputSource) else value for value in self.values]


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


def bind(
    records: Sequence[Record], state: RankState, mesh: Mesh, device: torch.device
) -> list[torch.Tensor | InputSource]:
    """What fills each placeholder on one rank: a slice of a weight, a tensor of the bank, or an argument."""
    return [_value(info.source, info, state, mesh, device) for info in records]


def _value(
    source: Source | None, info: Record, state: RankState, mesh: Mesh, device: torch.device
) -> torch.Tensor | InputSource:
    match source:
        case InputSource():
            return source
        case WeightSource(parameter, _):
            return state.store.get(parameter, info.placement)
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
