"""Which adapter slot each token of a forward uses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from bdlora_compile.errors import ConfigError

NO_ADAPTER = -1

Names = str | None | Sequence[str | None] | Sequence[Sequence[str | None]]
"""What `AdapterSet.use` takes: one name or None for all rows, one for each row, or one for each token of each row."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Selection:
    """Slots chosen by `AdapterSet.use`.

    Attributes:
        slots: int32: [] for one slot for all rows, [batch] by row, [batch, seq] by token. -1 is no adapter.
        repeats: how many batch rows each chosen row became (beams, several returned sequences).
    """

    slots: torch.Tensor
    repeats: int = 1

    def used(self) -> frozenset[int]:
        """The slots that some row or token uses."""
        return frozenset(self.slots.unique().tolist()) - {NO_ADAPTER}

    def by_token(self, batch: int, seq: int) -> torch.Tensor:
        """Slots of the batch * seq tokens of a forward, row-major.

        Raises:
            ConfigError: the selection was made for another batch.
        """
        slots = self.slots
        if slots.ndim and self.repeats > 1:
            slots = slots.repeat_interleave(self.repeats, dim=0)
        match slots.ndim:
            case 0:
                return slots.expand(batch * seq)
            case 1 if slots.shape[0] == batch:
                return slots[:, None].expand(batch, seq).reshape(-1)
            case 2 if tuple(slots.shape) == (batch, seq):
                return slots.reshape(-1)
            case _:
                raise ConfigError(
                    "adapters.use",
                    found=f"adapters for {_shape_text(slots)}",
                    expected=f"one name (or None) for each of the {batch} rows, or for each of {batch} x {seq} tokens",
                    remedy="pass as many names as the batch has rows; a choice by token serves one forward only",
                )


def _shape_text(slots: torch.Tensor) -> str:
    sizes = list(slots.shape)
    return f"{sizes[0]} rows" if len(sizes) == 1 else f"{sizes[0]} x {sizes[1]} tokens"


BASE_ONLY = Selection(torch.tensor(NO_ADAPTER, dtype=torch.int32))
"""No adapter for any row: what holds outside `use`."""


def choose(names: Names, lookup: Callable[[str], _T]) -> tuple[list[_T], torch.Tensor]:
    """The distinct adapters that ``names`` stand for, and for each name its place among them (-1: none).

    Args:
        names: see `Names`.
        lookup: what a name stands for; may raise.

    Raises:
        ConfigError: names by row and by token are mixed, or rows differ in length.
    """
    places: dict[_T, int] = {}

    def place(name: object) -> object:
        if name is None:
            return NO_ADAPTER
        if isinstance(name, str):
            return places.setdefault(lookup(name), len(places))
        return [place(part) for part in name]  # type: ignore[attr-defined]  # what cannot be iterated is refused

    try:
        choice = torch.tensor(place(names), dtype=torch.int64)
    except (ValueError, TypeError):
        raise ConfigError(
            "adapters.use",
            found="names by row and by token, or rows of different length",
            expected="one name (or None) for each row, or for each token in rows of the same length",
            remedy="give every row as many names as it has tokens",
        ) from None
    return list(places), choice
