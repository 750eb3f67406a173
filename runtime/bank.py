"""One rank's adapter bank: a pool of factors at a fixed address, and the tables that say where each slot's lie.

A loaded adapter is one contiguous chunk of the pool (all its sites, A then B), so a load is one copy and a slot takes
the elements of its own local ranks, whatever the other slots hold. Everything is written in place: graphs that were
compiled or captured keep the addresses of ``pool``, ``slots``, ``scales`` and ``token_slot``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bdlora_compile.errors import AdapterError
from bdlora_compile.factors import LocalFactors, LocalShape
from bdlora_compile.runtime.ops import SlotField

_ALIGNMENT = 16
"""Elements: 32 bytes of bf16, so that a kernel may load 16 bytes at a time from the start of any factor."""


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    """One rank's factors of an adapter, flat as they will lie in the pool.

    Attributes:
        chunk: all factors one after the other, each aligned.
        rows: int64 [sites, 7], the slot table's rows with offsets relative to the chunk.
        scales: float32 [sites].
    """

    chunk: torch.Tensor
    rows: torch.Tensor
    scales: torch.Tensor


@dataclass(slots=True)
class _Chunk:
    start: int
    size: int


class AdapterBank:
    """Pool, slot table and token slots of one rank.

    Args:
        site_names: the sites, in the order of the slot table's first dim.
        num_slots: S, adapters that can be resident at once.
        capacity: elements of the pool.
        max_tokens: T that one forward may have at most.
        dtype, device: of the pool.

    Attributes:
        pool: [capacity], the factors.
        slots: int64 [sites, S, 7], see `SlotField`.
        scales: float32 [sites, S].
        token_slot: int32 [max_tokens]; -1 is no adapter.
    """

    def __init__(
        self,
        site_names: Sequence[str],
        num_slots: int,
        capacity: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.site_index = {name: index for index, name in enumerate(site_names)}
        num_sites = len(site_names)
        # At least one site and slot, so that the tables of a model without adapters are ordinary tensors.
        self.pool = torch.zeros(max(capacity, 1), dtype=dtype, device=device)
        # Slots in fours: a layer's rows of a table then begin at a multiple of 16 bytes, as compiled code expects.
        shape = (max(num_sites, 1), -(-max(num_slots, 1) // 4) * 4)
        self.slots = torch.zeros(*shape, len(SlotField), dtype=torch.int64, device=device)
        self.slots[..., SlotField.A_BLOCKS] = 1
        self.slots[..., SlotField.B_BLOCKS] = 1
        self.scales = torch.zeros(*shape, dtype=torch.float32, device=device)
        self.token_slot = torch.full((max_tokens,), -1, dtype=torch.int32, device=device)
        self._chunks: dict[int, _Chunk] = {}

    def stage(self, factors: Mapping[str, tuple[LocalFactors, float]]) -> StagedAdapter:
        """Lay out one adapter's factors (and scalings) for this bank without touching the bank.

        Raises:
            AdapterError: a value is out of range for the pool's dtype.
        """
        rows = self.slots.new_zeros(self.slots.shape[0], len(SlotField), device="cpu")
        rows[:, SlotField.A_BLOCKS] = rows[:, SlotField.B_BLOCKS] = 1
        scales = torch.zeros(self.slots.shape[0], dtype=torch.float32)
        pieces: list[torch.Tensor] = []
        end = 0
        for name, (local, scaling) in factors.items():
            index = self.site_index[name]
            a_offset = end
            b_offset = a_offset + _aligned(local.shape.a_numel)
            end = b_offset + _aligned(local.shape.b_numel)
            pieces += [self._flat(local.a, name), self._flat(local.b, name)]
            rows[index] = _row(local.shape, a_offset, b_offset)
            scales[index] = scaling
        chunk = torch.cat(pieces) if pieces else torch.empty(0, dtype=self.pool.dtype)
        return StagedAdapter(chunk, rows, scales)

    def fits(self, size: int) -> bool:
        """Whether a chunk of ``size`` elements can be placed, compacting if need be."""
        return sum(chunk.size for chunk in self._chunks.values()) + size <= self.pool.numel()

    def write(self, slot: int, staged: StagedAdapter) -> None:
        """Put a staged adapter into a free slot, in place.

        Raises:
            AdapterError: the pool has no room.
        """
        size = staged.chunk.numel()
        start = self._place(size)
        self._chunks[slot] = _Chunk(start, size)
        self.pool[start : start + size].copy_(staged.chunk)
        rows = staged.rows.clone()
        rows[:, [SlotField.A_OFFSET, SlotField.B_OFFSET]] += start
        self.slots[:, slot].copy_(rows)
        self.scales[:, slot].copy_(staged.scales)

    def clear(self, slot: int) -> None:
        """Free a slot: its rank becomes 0 at every site."""
        del self._chunks[slot]
        self.slots[:, slot, [SlotField.A_RANK, SlotField.B_RANK]] = 0

    def used_elements(self) -> int:
        """Elements of the pool that loaded adapters take."""
        return sum(chunk.size for chunk in self._chunks.values())

    def _flat(self, factor: torch.Tensor, site: str) -> torch.Tensor:
        flat = factor.to(self.pool.dtype).reshape(-1)
        if not torch.isfinite(flat).all():
            raise AdapterError(
                f"factor of {site}",
                found="a value that overflows",
                expected=f"values in the range of {self.pool.dtype}",
                remedy="load the model in a wider dtype or train the adapter again",
            )
        padding = _aligned(flat.numel()) - flat.numel()
        return torch.nn.functional.pad(flat, (0, padding))

    def _place(self, size: int) -> int:
        """First gap of ``size`` elements; the pool is compacted when the free room is in pieces."""
        start = self._first_gap(size)
        if start is None and self.fits(size):
            self._compact()
            start = self._first_gap(size)
        if start is None:
            free = self.pool.numel() - self.used_elements()
            raise AdapterError(
                "adapter pool",
                found=f"{free} free elements of {self.pool.numel()}",
                expected=f"room for {size}",
                remedy="unload an adapter, or load the model with larger max_adapters or max_rank",
            )
        return start

    def _first_gap(self, size: int) -> int | None:
        end = 0
        for chunk in sorted(self._chunks.values(), key=lambda chunk: chunk.start):
            if chunk.start - end >= size:
                return end
            end = max(end, chunk.start + chunk.size)
        return end if self.pool.numel() - end >= size else None

    def _compact(self) -> None:
        """Move all chunks to the front, in place, and their offsets with them."""
        end = 0
        for slot, chunk in sorted(self._chunks.items(), key=lambda item: item[1].start):
            if chunk.start != end:
                # A clone: source and target may overlap.
                moved = self.pool[chunk.start : chunk.start + chunk.size].clone()
                self.pool[end : end + chunk.size].copy_(moved)
                self.slots[:, slot, [SlotField.A_OFFSET, SlotField.B_OFFSET]] += end - chunk.start
                chunk.start = end
            end += chunk.size


def chunk_elements(shapes: Sequence[LocalShape]) -> int:
    """Elements of the pool that an adapter with these factors takes."""
    return sum(_aligned(shape.a_numel) + _aligned(shape.b_numel) for shape in shapes)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _row(shape: LocalShape, a_offset: int, b_offset: int) -> torch.Tensor:
    fields = {
        SlotField.A_OFFSET: a_offset,
        SlotField.B_OFFSET: b_offset,
        SlotField.A_RANK: shape.a_rank,
        SlotField.B_RANK: shape.b_rank,
        SlotField.A_BLOCKS: shape.a_blocks,
        SlotField.B_BLOCKS: shape.b_blocks,
        SlotField.OUT_START: shape.out_start,
    }
    return torch.tensor([fields[field] for field in SlotField], dtype=torch.int64)
