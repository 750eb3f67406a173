"""One rank's adapter bank: a pool of factors at a fixed address, and the tables that say where each slot's lie.

A loaded adapter is one contiguous chunk of the pool (all its sites, A then B), so a load is one copy and a slot takes
the elements of its own local ranks, whatever the other slots hold. Everything is written in place: graphs that were
compiled or captured keep the addresses of ``pool``, ``slots``, ``scales`` and ``token_slot``. Where a chunk goes is
decided elsewhere, once for all ranks (`adapter_pool`); the bank does it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bdlora_compile.errors import AdapterError
from bdlora_compile.factors import LocalFactors, LocalShape
from bdlora_compile.runtime.adapter_pool import Move
from bdlora_compile.runtime.adapter_tensors import is_finite
from bdlora_compile.runtime.copier import Copier, PlainCopier, Ticket
from bdlora_compile.runtime.hashing import sha256_of
from bdlora_compile.runtime.ops import SlotField

_ALIGNMENT = 16
"""Elements: 32 bytes of bf16, so that a kernel may load 16 bytes at a time from the start of any factor."""
_HASHED_AT_ONCE = 1_000_000
"""Elements of a chunk."""
_BOUNCE_BYTES = 16_000_000
"""Room through which chunks are moved: the old and the new place may overlap. 16 MB take an H100 some 10 us."""


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    """One rank's factors of an adapter in host memory, flat as they will lie in the pool.

    Attributes:
        chunk: all factors one after the other, each aligned.
        rows: int64 [sites, 7], the slot table's rows with offsets relative to the chunk.
        scales: float32 [sites].
    """

    chunk: torch.Tensor
    rows: torch.Tensor
    scales: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it takes."""
        return self.chunk.nbytes + self.rows.nbytes + self.scales.nbytes

    def fingerprint(self) -> str:
        """SHA-256 of what a rank would copy, to tell whether a later reading found the same."""
        return sha256_of([[self.rows, self.scales], *([piece] for piece in self.chunk.split(_HASHED_AT_ONCE))])


class AdapterBank:
    """Pool, slot table and token slots of one rank.

    Args:
        site_names: the sites, in the order of the slot table's first dim.
        num_slots: S, adapters that can be resident at once.
        capacity: elements of the pool.
        max_tokens: T that one forward may have at most.
        dtype, device: of the pool.
        copier: how factors get to the device.

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
        copier: Copier | None = None,
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
        self._copier = copier or PlainCopier()
        self._sizes: dict[int, int] = {}
        self._uploads: dict[int, Ticket] = {}
        # Taken now: a full device must not stop a move, nor an upload whose slot has been given to it.
        self._rows = self.slots[:, 0].clone(memory_format=torch.contiguous_format)
        self._scales = self.scales[:, 0].clone(memory_format=torch.contiguous_format)
        self._bounce = self.pool.new_empty(min(max(capacity, 1), _BOUNCE_BYTES // self.pool.element_size()))

    def stage(self, factors: Mapping[str, tuple[LocalFactors, float]]) -> StagedAdapter:
        """Lay out one adapter's factors (and scalings) for this bank, in host memory, without touching the bank.

        Raises:
            AdapterError: a value is out of range for the pool's dtype.
        """
        num_sites = self.slots.shape[0]
        rows, scales = [_EMPTY_ROW] * num_sites, [0.0] * num_sites
        chunk = self._copier.host_memory(
            chunk_elements([local.shape for local, _ in factors.values()]), self.pool.dtype
        )
        end = 0
        for name, (local, scaling) in factors.items():
            index = self.site_index[name]
            a_offset = end
            b_offset = a_offset + _aligned(local.shape.a_numel)
            end = b_offset + _aligned(local.shape.b_numel)
            _fill(chunk[a_offset:b_offset], local.a)
            _fill(chunk[b_offset:end], local.b)
            rows[index] = _row(local.shape, a_offset, b_offset)
            scales[index] = scaling
        if not is_finite(chunk):
            raise _overflow(
                [name for name, (local, _) in factors.items() if not _fits(local, chunk.dtype)], chunk.dtype
            )
        return StagedAdapter(
            chunk,
            self._in_host_memory(torch.tensor(rows, dtype=torch.int64)),
            self._in_host_memory(torch.tensor(scales, dtype=torch.float32)),
        )

    def write(self, slot: int, staged: StagedAdapter, start: int) -> None:
        """Put a staged adapter into a free slot and the free room from ``start`` on, in place, beside forwards."""
        self._sizes[slot] = staged.chunk.numel()
        self._uploads[slot] = self._copier.upload(lambda: self._copy(slot, staged, start))

    def move(self, moves: Sequence[Move]) -> None:
        """Move chunks towards the front of the pool, in the given order, and their offsets with them."""
        if not moves:
            return
        tickets, self._uploads = list(self._uploads.values()), {}
        self._copier.between_steps(lambda: self._move_all(moves), tickets)

    def clear(self, slot: int) -> None:
        """Free a slot: its rank becomes 0 at every site."""
        del self._sizes[slot]
        self._copier.between_steps(lambda: self._zero(slot), self._waiting([slot]))

    def before_step(self, slots: Iterable[int]) -> None:
        """A forward whose tokens use ``slots`` is about to be launched: it waits for what is still on its way."""
        self._copier.step(self._waiting(slots))

    def used_elements(self) -> int:
        """Elements of the pool that this rank's factors take."""
        return sum(self._sizes.values())

    def _copy(self, slot: int, staged: StagedAdapter, start: int) -> None:
        self.pool[start : start + staged.chunk.numel()].copy_(staged.chunk, non_blocking=True)
        # By way of memory that lies together: else torch would ask the device for some, and might get none.
        self._rows.copy_(staged.rows, non_blocking=True)
        self._rows[:, SlotField.A_OFFSET] += start
        self._rows[:, SlotField.B_OFFSET] += start
        self.slots[:, slot].copy_(self._rows)
        self._scales.copy_(staged.scales, non_blocking=True)
        self.scales[:, slot].copy_(self._scales)

    def _move_all(self, moves: Sequence[Move]) -> None:
        for move in moves:
            self._move_chunk(move)
            rows = self.slots[:, move.slot]
            rows[:, SlotField.A_OFFSET] -= move.source - move.target
            rows[:, SlotField.B_OFFSET] -= move.source - move.target

    def _move_chunk(self, move: Move) -> None:
        """Towards the front in ascending pieces: no piece is written over one that was not read yet."""
        end, step = move.source + self._sizes[move.slot], self._bounce.numel()
        for source in range(move.source, end, step):
            size = min(step, end - source)
            target = source - move.source + move.target
            self._bounce[:size].copy_(self.pool[source : source + size])
            self.pool[target : target + size].copy_(self._bounce[:size])

    def _zero(self, slot: int) -> None:
        self.slots[:, slot, SlotField.A_RANK].zero_()
        self.slots[:, slot, SlotField.B_RANK].zero_()

    def _waiting(self, slots: Iterable[int]) -> list[Ticket]:
        return [self._uploads.pop(slot) for slot in slots if slot in self._uploads]

    def _in_host_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._copier.host_memory(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)


def _fill(room: torch.Tensor, factor: torch.Tensor) -> None:
    """Write a factor into its room of a chunk, in the chunk's dtype, zeros behind it."""
    size = factor.numel()
    room[:size].view(factor.shape).copy_(factor)
    if size < room.numel():
        room[size:].zero_()


def _fits(local: LocalFactors, dtype: torch.dtype) -> bool:
    return all(is_finite(factor.to(dtype)) for factor in (local.a, local.b))


def _overflow(sites: Sequence[str], dtype: torch.dtype) -> AdapterError:
    return AdapterError(
        f"factors of {sites[0]}" + (f" and {len(sites) - 1} more sites" if sites[1:] else ""),
        found="a value that overflows",
        expected=f"values in the range of {dtype}",
        remedy="load the model in a wider dtype or train the adapter again",
    )


def chunk_elements(shapes: Sequence[LocalShape]) -> int:
    """Elements of the pool that an adapter with these factors takes."""
    return sum(_aligned(shape.a_numel) + _aligned(shape.b_numel) for shape in shapes)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _row(shape: LocalShape, a_offset: int, b_offset: int) -> list[int]:
    fields = {
        SlotField.A_OFFSET: a_offset,
        SlotField.B_OFFSET: b_offset,
        SlotField.A_RANK: shape.a_rank,
        SlotField.B_RANK: shape.b_rank,
        SlotField.A_BLOCKS: shape.a_blocks,
        SlotField.B_BLOCKS: shape.b_blocks,
        SlotField.OUT_START: shape.out_start,
    }
    return [fields[field] for field in SlotField]


_EMPTY_ROW = _row(LocalShape(0, 0, 1, 1, 0, 0), 0, 0)
"""Of a site without LoRA: rank 0."""
