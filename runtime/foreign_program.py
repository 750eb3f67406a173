"""Running a graph that others sharded: factors rebuilt at load, and the parameters that this rests on watched."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import Graph

from bdlora_compile.collectives import group_named
from bdlora_compile.errors import ConfigError
from bdlora_compile.ir import RebuiltSource, placeholders, record


@dataclass(frozen=True, slots=True)
class _Watched:
    index: int
    name: str
    version: int
    address: int


class ForeignProgram:
    """A graph of arguments and rebuilt factors.

    Args:
        run: the graph.
        factors: the rebuilt factors, its last arguments.
        watched: (index of the argument, name, tensor) of parameters that must stay as they are.
    """

    def __init__(
        self, run: Callable[..., Any], factors: Sequence[Tensor], watched: Sequence[tuple[int, str, Tensor]]
    ) -> None:
        self._run = run
        self._factors = factors
        self._watched = [_Watched(index, name, *_state(tensor)) for index, name, tensor in watched]

    def __call__(self, *args: Any) -> Any:
        """Run it.

        Raises:
            ConfigError: a parameter on whose values the graph rests was written or replaced.
        """
        for watched in self._watched:
            if _state(args[watched.index]) != (watched.version, watched.address):
                raise ConfigError(
                    f"LoRA factor {watched.name}",
                    found="a tensor that was written or replaced after the model was compiled",
                    expected="the values that the ranks' own blocks were taken from",
                    remedy="compile the model again after a write (`torch.compiler.reset()`, then call it)",
                )
        return self._run(*args, *self._factors)


def _state(tensor: Tensor) -> tuple[int, int]:
    return (0 if tensor.is_inference() else tensor._version), tensor.data_ptr()


def rebuilt_sources(graph: Graph) -> list[RebuiltSource]:
    """The factors that a graph wants rebuilt, in the order of its placeholders."""
    sources = [record(node).source for node in placeholders(graph)]
    return [source for source in sources if isinstance(source, RebuiltSource)]


def parts_for_ranks(source: RebuiltSource, tensor: Tensor) -> list[Tensor]:
    """What this rank's rows of a factor give to each rank, [r, O/N]."""
    matrix = tensor.detach() if source.rank_dim == 0 else tensor.detach().t()
    return [matrix[list(columns)] for columns in source.columns]


def rebuild(sources: Sequence[RebuiltSource], tensors: Mapping[int, Tensor]) -> list[Tensor]:
    """This rank's columns of each factor, [r, O], by one all-to-all for each process group and dtype.

    Args:
        sources: the factors, the same on every rank of a group.
        tensors: this rank's rows of each, by the index of the argument.
    """
    by_group: dict[tuple[str, torch.dtype], list[int]] = defaultdict(list)
    for position, source in enumerate(sources):
        by_group[source.group, tensors[source.index].dtype].append(position)
    rebuilt: dict[int, Tensor] = {}
    for (group, _), positions in by_group.items():
        given = [parts_for_ranks(sources[position], tensors[sources[position].index]) for position in positions]
        for position, received in zip(positions, _exchange(given, group), strict=True):
            # Ranks' rows lie one after the other along O.
            rebuilt[position] = torch.cat(received, dim=1)
    return [rebuilt[position] for position in range(len(sources))]


def _exchange(given: Sequence[Sequence[Tensor]], group: str) -> list[list[Tensor]]:
    """given[factor][rank] goes to that rank; what comes from each rank, [factor][rank]."""
    ranks = range(len(given[0]))
    send = [torch.cat([parts[rank].reshape(-1) for parts in given]) for rank in ranks]
    process_group = group_named(group)
    own = process_group.rank()
    # Every rank takes as much of each factor from all ranks: the columns that are its own.
    counts = [parts[own].numel() for parts in given]
    received = send[0].new_empty(len(send) * sum(counts))
    dist.all_to_all_single(
        received, torch.cat(send), [sum(counts)] * len(send), [part.numel() for part in send], process_group
    )
    by_rank = [chunk.split(counts) for chunk in received.split(sum(counts))]
    return [[by_rank[rank][factor].view_as(given[factor][own]) for rank in ranks] for factor in range(len(given))]
