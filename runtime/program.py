"""What the backend returns to Dynamo: compiled regions with this rank's values bound to their placeholders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bdlora_compile.errors import PassError
from bdlora_compile.ir import (
    ArgumentWeight,
    BankSource,
    CacheSource,
    CarriedSource,
    InputSource,
    MailboxSource,
    MergedSource,
    RankIndices,
    RebuiltSource,
    SharedSource,
    Source,
    SymmetricSource,
    WeightSource,
)
from bdlora_compile.placement import Placement, Shard, shard_slice
from bdlora_compile.plan import ModelPlan
from bdlora_compile.runtime.agreement import is_lost_rank
from bdlora_compile.runtime.deployment import Deployment, RankState
from bdlora_compile.runtime.step_graphs import StepGraphs

RECORDED_TOKENS = 2048
"""Tokens of the largest forward that is recorded: larger ones keep a GPU busy while the host launches them."""

Callee = Callable[..., Any]
CallSource = InputSource | CacheSource | CarriedSource | SharedSource
"""What a call brings: an argument, a layer of the cache that an argument holds, or a value of an earlier region."""


@dataclass(frozen=True, slots=True)
class BoundRegion:
    """One run of a region on one rank.

    Attributes:
        run: the region as a function of all its placeholders.
        values: a bound tensor for each placeholder, or what of a call fills it.
    """

    run: Callee
    values: Sequence[torch.Tensor | CallSource]


@dataclass(frozen=True, slots=True)
class Variants:
    """The two graphs of one forward on one rank, each a sequence of regions.

    Attributes:
        with_lora: for batches in which some row has an adapter.
        base_only: for the others; the same one where the model has no LoRA site.
    """

    with_lora: Sequence[BoundRegion]
    base_only: Sequence[BoundRegion]


@dataclass(slots=True)
class Flow:
    """The values of one call on one rank, as they go through the regions.

    Attributes:
        args: arguments of the call.
        carried: what the last region handed on.
        shared: what the first region returned: what it handed on, then what it computed for all others.
    """

    args: Sequence[Any]
    carried: Sequence[Any] = ()
    shared: Sequence[Any] = ()
    _caches: dict[int, Sequence[torch.Tensor]] = field(default_factory=dict)

    def arguments(self, values: Sequence[torch.Tensor | CallSource]) -> list[Any]:
        """Values of all placeholders of a region."""
        return [self._fill(value) for value in values]

    def take(self, results: Sequence[Any]) -> None:
        """Take what a region returned."""
        self.carried = results
        self.shared = self.shared or results

    def _fill(self, value: torch.Tensor | CallSource) -> Any:
        match value:
            case torch.Tensor():
                return value
            case CarriedSource(index):
                return self.carried[index]
            case SharedSource(index):
                return self.shared[index]
            case InputSource(index):
                return self.args[index]
            case CacheSource(index, layer, part):
                if index not in self._caches:
                    self._caches[index] = cache_views(self.args[index])
                return self._caches[index][2 * layer + part]


@dataclass(frozen=True, slots=True)
class Launched:
    """A call of a program that launches recorded steps: what it was given, and what it gave."""

    program: "Program"
    args: Sequence[Any]
    results: Sequence[Any]


class Program:
    """A graph ready to run on this rank.

    Args:
        deployment: the model's state.
        variants: this rank's graphs.
        token_index: the argument whose first two dims are [batch, seq].
        steps: records and replays forwards of up to `RECORDED_TOKENS`; None launches every operator.
    """

    def __init__(
        self, deployment: Deployment, variants: Variants, token_index: int, steps: StepGraphs | None = None
    ) -> None:
        self._deployment = deployment
        self._variants = variants
        self._token_index = token_index
        self._steps = steps
        self._has_run = False

    def __call__(self, *args: Any) -> Any:
        """Choose the adapters of the batch, then run.

        Raises:
            AgreementError: a collective failed, since another rank died or hangs.
        """
        with self._deployment.step:
            try:
                results = self._run(args)
            except RuntimeError as error:
                if not is_lost_rank(error):
                    raise
                raise self._deployment.agreement.give_up(str(error)) from error
            if self._deployment.watch is not None:
                self._deployment.watch.launched(is_first=not self._has_run)
            self._has_run = True
            return results

    def _run(self, args: Sequence[Any]) -> Any:
        batch, seq = args[self._token_index].shape[:2]
        has_adapters = self._deployment.select(batch, seq)
        regions = self._variants.with_lora if has_adapters else self._variants.base_only
        forward = partial(through, regions)
        if self._steps is None or batch * seq > RECORDED_TOKENS or _is_captured_by_caller():
            return forward(args)
        results = self._steps.run(has_adapters, args, forward)
        self._deployment.last_step = Launched(self, args, results)
        return results


def through(regions: Sequence[BoundRegion], args: Sequence[Any]) -> Sequence[Any]:
    """Run a forward's regions, one after the other; returns the last one's results."""
    flow, results = Flow(args), ()
    for region in regions:
        results = region.run(*flow.arguments(region.values))
        flow.take(results)
    return results


def _is_captured_by_caller() -> bool:
    """Whether the caller records the forward itself, in a CUDA graph of its own."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def cache_views(store: torch.Tensor) -> Sequence[torch.Tensor]:
    """Keys and values of all layers of a cache [layers, 2, ...]: keys of layer l at 2 l, values at 2 l + 1."""
    return store.flatten(0, 1).unbind()


def bind(
    sources: Sequence[Source | None], placements: Sequence[Placement], state: RankState, plan: ModelPlan
) -> list[torch.Tensor | CallSource]:
    """What fills each placeholder on one rank: a slice of a weight, a tensor of the bank, or a part of the call."""
    return [_value(source, placement, state, plan) for source, placement in zip(sources, placements, strict=True)]


def _value(source: Source | None, placement: Placement, state: RankState, plan: ModelPlan) -> torch.Tensor | CallSource:
    match source:
        case InputSource() | CacheSource() | CarriedSource() | SharedSource():
            return source
        case WeightSource(parameter, _):
            return state.store.get(parameter, placement)
        case MergedSource(parts):
            return state.store.get_merged(parts)
        case BankSource(field, layer):
            table: torch.Tensor = getattr(state.bank, field.value)
            return table if layer is None else table[plan.rows(layer)]
        case SymmetricSource() if state.all_reduce.buffer is not None:
            return state.all_reduce.buffer
        case MailboxSource() if state.all_reduce.mailbox is not None:
            return state.all_reduce.mailbox
        case RankIndices(length, pieces):
            part = shard_slice((length * pieces,), Shard(0, pieces), state.rank, plan.mesh)
            return torch.arange(part.start, part.stop, device=plan.device)
        case ArgumentWeight() | RebuiltSource() | SymmetricSource() | MailboxSource() | None:
            raise PassError(
                "placeholder",
                found="no source, or one of a model that its owner sharded",
                expected="a weight, a tensor of the bank, symmetric memory, or an argument",
                remedy="report this: the tag pass has to run first",
            )
