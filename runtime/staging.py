"""From a folder to factors in host memory, ready to be copied: all that can fail is done before anything changes."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from bdlora_compile.errors import AdapterError, AgreementError, BdloraError
from bdlora_compile.factors import Layout, local_shape, read_local
from bdlora_compile.plan import ModelPlan
from bdlora_compile.runtime.adapter_file import Adapter, read_adapter
from bdlora_compile.runtime.adapter_version import Version, content_digest
from bdlora_compile.runtime.agreement import Agreement
from bdlora_compile.runtime.bank import StagedAdapter
from bdlora_compile.runtime.deployment import Deployment, RankState
from bdlora_compile.sites import Site

_T = TypeVar("_T")

_MAX_REPORTED = 1000
"""Characters of a rank's problem that the other ranks are told."""


@dataclass(frozen=True, slots=True)
class StagedContent:
    """An adapter that this process has read, checked and laid out.

    Attributes:
        digest: see `content_digest`.
        rank: its largest rank R.
        notes: things about it that are served but worth knowing.
        source: where it can be read again.
        parts: for each hosted rank, its factors in host memory.
        fingerprints: of the parts.
    """

    digest: str
    rank: int
    notes: Sequence[str]
    source: Path | Adapter
    parts: Sequence[StagedAdapter]
    fingerprints: Sequence[str]

    @property
    def elements(self) -> int:
        """Room that the fullest hosted rank needs."""
        return max(part.chunk.numel() for part in self.parts)


@dataclass(frozen=True, slots=True)
class Stager:
    """Reads adapters for the ranks that this process hosts.

    Attributes:
        deployment: the model's state; nothing of it is changed here.
        base_model: name or path of the served model, to be compared with the one an adapter names.
    """

    deployment: Deployment
    base_model: str | None

    def stage(self, source: Path | Adapter) -> StagedContent:
        """Read, check, digest and lay out an adapter.

        Raises:
            AdapterError: it cannot be served, or there is no host memory for it.
        """
        return _own_errors(str(getattr(source, "source", source)), lambda: self._stage(source))

    def stage_again(self, version: Version) -> Sequence[StagedAdapter]:
        """Bring a version back from where it was loaded from.

        Raises:
            AdapterError: it is not there any more, or is no longer the same.
        """
        where = f"adapter {version.name!r}"
        parts = _own_errors(where, lambda: self._parts(self._read(version.source)))
        if [part.fingerprint() for part in parts] != list(version.fingerprints):
            raise AdapterError(
                where,
                found=f"other contents at {getattr(version.source, 'source', version.source)} than were loaded",
                expected=f"version {version.digest[:12]}",
                remedy="load it again, which makes the new contents another version",
            )
        return parts

    def _stage(self, source: Path | Adapter) -> StagedContent:
        adapter = self._read(source)
        with adapter.opened():
            digest = content_digest(adapter)
            parts = self._parts(adapter)
        # Of an adapter in a file only the folder is kept: its description takes more memory than the path.
        source_again = adapter.folder or adapter
        fingerprints = [part.fingerprint() for part in parts]
        return StagedContent(digest, adapter.max_rank, adapter.notes, source_again, parts, fingerprints)

    def _read(self, source: Path | Adapter) -> Adapter:
        plan = self.deployment.plan
        adapter = (
            source if isinstance(source, Adapter) else read_adapter(source, plan.sites, base_model=self.base_model)
        )
        if adapter.max_rank > plan.max_rank:
            raise AdapterError(
                adapter.source,
                found=f"rank {adapter.max_rank}",
                expected=f"at most max_rank={plan.max_rank}",
                remedy=f"load the model with max_rank={adapter.max_rank} or more",
            )
        for state in self.deployment.ranks:
            _require_local_rank(adapter, plan, state.rank)
        return adapter

    def _parts(self, adapter: Adapter) -> Sequence[StagedAdapter]:
        with adapter.opened():
            return [self._part(adapter, rank) for rank in self.deployment.ranks]

    def _part(self, adapter: Adapter, state: RankState) -> StagedAdapter:
        plan = self.deployment.plan
        factors = {
            site: (read_local(found, plan.sites[site], plan.layouts[site], state.rank, plan.mesh), found.scaling)
            for site, found in adapter.factors.items()
        }
        try:
            return state.bank.stage(factors)
        except AdapterError:
            adapter.check_finite()  # names the tensor, if its values themselves are at fault
            raise


def _require_local_rank(adapter: Adapter, plan: ModelPlan, rank: int) -> None:
    """
    Raises:
        AdapterError: a site of the local layout has a larger rank on this rank than the graphs were made for.
    """
    if plan.max_local_rank >= plan.max_rank:
        return
    for name, found in adapter.factors.items():
        if plan.layouts[name] is not Layout.LOCAL:
            continue
        local = local_shape(found, plan.sites[name], Layout.LOCAL, rank, plan.mesh).a_rank
        if local > plan.max_local_rank:
            raise AdapterError(
                f"{adapter.source}, {name}",
                found=f"factors of rank {local} on a rank (R = {found.rank}, G = {found.nblocks})",
                expected=f"at most max_local_rank={plan.max_local_rank}",
                remedy=f"load the model with max_local_rank={local} or more, or without it",
            )


def read_together(
    paths: Mapping[str, str | Path], sites: Mapping[str, Site], base_model: str | None, agreement: Agreement
) -> dict[str, Adapter]:
    """Read and check adapters by name on every rank; if one rank cannot, all say so instead of waiting for it.

    Raises:
        AdapterError: an adapter cannot be served, on this rank or on another.
        AgreementError: a rank did not answer in time.
    """
    found: dict[str, Adapter] = {}
    problem: BdloraError | None = None
    try:
        for name, path in paths.items():
            found[name] = _own_errors(str(path), partial(read_adapter, path, sites, base_model=base_model))
    except BdloraError as error:
        problem = error
    if paths:
        agree(agreement, "adapters to begin with", problem, {}, is_setup=True)
    return found


def agree(
    agreement: Agreement,
    topic: str,
    problem: BdloraError | None,
    facts: Mapping[str, object],
    equal: Collection[str] = (),
    is_setup: bool = False,
) -> Sequence[Mapping[str, object]]:
    """All ranks can do it or none does: raise this rank's problem, or the first of another rank.

    Args:
        agreement: how the ranks compare notes.
        topic: what is done.
        problem: why this rank cannot do it.
        facts: what the other ranks are told.
        equal: facts that must be the same on every rank.
        is_setup: the model is being loaded: other ranks may need longer.

    Returns:
        The facts of every rank, in rank order.
    """
    told = {"problem": str(problem)[:_MAX_REPORTED] if problem else "", **facts}
    answers = [json.loads(text) for text in agreement.exchange(topic, json.dumps(told), is_setup=is_setup)]
    if problem is not None:
        raise problem
    for rank, answer in enumerate(answers):
        if answer["problem"]:
            raise AdapterError(
                f"{topic} on rank {rank}",
                found=answer["problem"],
                expected="adapters that every rank can read",
                remedy="mend that rank's copy; no rank has changed anything",
            )
    for fact in equal:
        for rank, answer in enumerate(answers):
            if answer[fact] != answers[0][fact]:
                raise AgreementError(
                    f"{topic} on rank {rank}",
                    found=f"{fact} {str(answer[fact])[:100]}",
                    expected=f"what rank 0 has: {str(answers[0][fact])[:100]}",
                    remedy="give every rank the same files and make the same calls; no rank has changed anything",
                )
    return answers


def _own_errors(where: str, work: Callable[[], _T]) -> _T:
    """Turn whatever stops the work on this rank into an error that the other ranks can be told of."""
    try:
        return work()
    except BdloraError:
        raise
    except (OSError, RuntimeError, MemoryError, ValueError) as error:
        raise AdapterError(
            where,
            found=f"{type(error).__name__}: {str(error)[:200] or 'no details'}",
            expected="room and access to read it",
            remedy="free memory or mend the file, then load it again",
        ) from error
