"""The set of adapters that a model serves: which are loaded, and which one each row or token uses."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bdlora_compile.errors import AdapterError, BdloraError, ConfigError
from bdlora_compile.factors import read_local
from bdlora_compile.runtime.adapter_file import Adapter, read_adapter
from bdlora_compile.runtime.bank import StagedAdapter
from bdlora_compile.runtime.deployment import Deployment, RankState
from bdlora_compile.runtime.selection import NO_ADAPTER, Selection

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

Names = str | None | Sequence[str | None] | Sequence[Sequence[str | None]]


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """A resident adapter.

    Attributes:
        slot: its row in the slot tables.
        rank: its largest rank R.
        notes: things about it that are served but worth knowing.
    """

    slot: int
    rank: int
    notes: Sequence[str]


class AdapterSet:
    """The adapters of one model, as `bdlora_compile.load` returns them.

    ``use`` chooses adapters for what runs inside it; ``load`` and ``unload`` change the set while serving, without
    compiling anything again. With several ranks every rank makes the same calls in the same order.
    """

    def __init__(self, deployment: Deployment, num_slots: int, base_model: str | None) -> None:
        self._deployment = deployment
        self._num_slots = num_slots
        self._base_model = base_model
        self._loaded: dict[str, LoadedAdapter] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the loaded adapters, oldest first."""
        return tuple(self._loaded)

    def __contains__(self, name: object) -> bool:
        return name in self._loaded

    def __len__(self) -> int:
        return len(self._loaded)

    def __getitem__(self, name: str) -> LoadedAdapter:
        return self._loaded[self._known(name)]

    def load(self, name: str, path: str | Path) -> LoadedAdapter:
        """Load an adapter from a PEFT folder; nothing changes unless every rank has read and checked it.

        Raises:
            AdapterError: the name is taken or malformed, the adapter cannot be served, or there is no room.
            AgreementError: a rank did not answer in time.
        """
        plan = self._deployment.plan
        return self._add(name, lambda: read_adapter(path, plan.sites, base_model=self._base_model))

    def add(self, name: str, adapter: Adapter) -> LoadedAdapter:
        """Load an adapter that was read already; otherwise like `load`."""
        return self._add(name, lambda: adapter)

    def unload(self, name: str) -> None:
        """Free an adapter's slot.

        Raises:
            AdapterError: there is no such adapter, or `use` has chosen it.
        """
        loaded = self[name]
        if (self._deployment.selection.slots == loaded.slot).any():
            raise AdapterError(
                f"adapter {name!r}",
                found="rows that use it",
                expected="an adapter that no row uses",
                remedy="unload it after the `use` block",
            )
        for rank in self._deployment.ranks:
            rank.bank.clear(loaded.slot)
        del self._loaded[name]
        self._deployment.forget_selection()

    @contextmanager
    def use(self, names: Names) -> Iterator[None]:
        """Choose adapters for the forwards inside the block.

        Args:
            names: one name or None for all rows; a sequence with one for each row of the batch; or one sequence a row
                with one for each token of a single forward. None is the base model.

        Raises:
            AdapterError: a name is not loaded.
            ConfigError: rows of names differ in length.
        """
        slots = self._slots(names)
        try:
            chosen = Selection(torch.tensor(slots, dtype=torch.int32))
        except (ValueError, TypeError):
            raise ConfigError(
                "adapters.use",
                found="names by row and by token, or rows of different length",
                expected="one name (or None) for each row, or for each token in rows of the same length",
                remedy="give every row as many names as it has tokens",
            ) from None
        previous = self._deployment.selection
        self._deployment.selection = chosen
        try:
            yield
        finally:
            self._deployment.selection = previous

    # --- loading ----------------------------------------------------------------------------------------------------

    def _add(self, name: str, read: Callable[[], Adapter]) -> LoadedAdapter:
        staged: list[StagedAdapter] = []
        adapter: Adapter | None = None
        problem: BdloraError | None = None
        try:
            self._check_name(name)
            adapter = read()
            self._check_rank(name, adapter)
            with adapter.opened():
                staged = [self._stage(adapter, rank) for rank in self._deployment.ranks]
            self._check_room(name, staged)
        except BdloraError as error:
            problem = error
        self._agree(name, problem)
        assert adapter is not None, "no rank has a problem"
        loaded = LoadedAdapter(self._free_slot(), adapter.max_rank, adapter.notes)
        for rank, part in zip(self._deployment.ranks, staged, strict=True):
            rank.bank.write(loaded.slot, part)
        self._loaded[name] = loaded
        self._deployment.forget_selection()
        return loaded

    def _agree(self, name: str, problem: BdloraError | None) -> None:
        """All ranks have it or none: raise this rank's problem, or the first one of another rank."""
        answers = self._deployment.agreement.exchange(f"load of adapter {name}"[:150], str(problem or ""))
        if problem is not None:
            raise problem
        for rank, answer in enumerate(answers):
            if answer:
                raise AdapterError(
                    f"adapter {name!r} on rank {rank}",
                    found=answer,
                    expected="an adapter that every rank can read",
                    remedy="mend that rank's copy; no rank has loaded it",
                )

    def _stage(self, adapter: Adapter, state: RankState) -> StagedAdapter:
        plan = self._deployment.plan
        factors = {
            site: (read_local(found, plan.sites[site], plan.layouts[site], state.rank, plan.mesh), found.scaling)
            for site, found in adapter.factors.items()
        }
        return state.bank.stage(factors)

    def _check_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise AdapterError(
                f"adapter name {name!r:.60}",
                found="characters or a length outside the pattern",
                expected=_NAME.pattern,
                remedy="choose a name of letters, digits, '.', '_' and '-'",
            )
        if name in self._loaded:
            raise AdapterError(
                f"adapter {name!r}",
                found="an adapter loaded under this name",
                expected="a new name",
                remedy="unload it first, or choose another name",
            )
        if len(self._loaded) >= self._num_slots:
            raise AdapterError(
                f"adapter {name!r}",
                found=f"{len(self._loaded)} adapters loaded",
                expected=f"fewer than max_adapters={self._num_slots}",
                remedy="unload one, or load the model with a larger max_adapters",
            )

    def _check_rank(self, name: str, adapter: Adapter) -> None:
        max_rank = self._deployment.plan.max_rank
        if adapter.max_rank > max_rank:
            raise AdapterError(
                f"adapter {name!r}",
                found=f"rank {adapter.max_rank}",
                expected=f"at most max_rank={max_rank}",
                remedy=f"load the model with max_rank={adapter.max_rank} or more",
            )

    def _check_room(self, name: str, staged: Sequence[StagedAdapter]) -> None:
        for rank, part in zip(self._deployment.ranks, staged, strict=True):
            if not rank.bank.fits(part.chunk.numel()):
                raise AdapterError(
                    f"adapter {name!r} on rank {rank.rank}",
                    found=f"{rank.bank.pool.numel() - rank.bank.used_elements()} free elements in the pool",
                    expected=f"{part.chunk.numel()}",
                    remedy="unload an adapter, or load the model with larger max_adapters or max_rank",
                )

    def _free_slot(self) -> int:
        taken = {loaded.slot for loaded in self._loaded.values()}
        return next(slot for slot in range(self._num_slots) if slot not in taken)

    # --- choosing ---------------------------------------------------------------------------------------------------

    def _slots(self, names: Names) -> object:
        if names is None:
            return NO_ADAPTER
        if isinstance(names, str):
            return self[names].slot
        return [self._slots(name) for name in names]

    def _known(self, name: str) -> str:
        if name in self._loaded:
            return name
        loaded = ", ".join(list(self._loaded)[:10]) or "none"
        raise AdapterError(
            f"adapter {name!r:.60}",
            found="no adapter of this name",
            expected=f"one of the loaded adapters ({loaded}{', ...' if len(self._loaded) > 10 else ''})",
            remedy="load it with `adapters.load(name, path)`",
        )
