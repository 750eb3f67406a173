"""The adapter bank alone: where factors lie, what moving keeps, and what has to wait for what on a device."""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bdlora_compile.errors import AdapterError
from bdlora_compile.factors import LocalFactors, LocalShape
from bdlora_compile.runtime import bank as bank_module
from bdlora_compile.runtime.adapter_pool import Move
from bdlora_compile.runtime.bank import AdapterBank, StagedAdapter
from bdlora_compile.runtime.copier import Copier
from bdlora_compile.runtime.ops import SlotField, lora_apply
from tests.runtime.late_copier import LateCopier

SITES = ("first", "second")
SIZE = 2 * (4 * 16 + 4 * 8)
"""Elements of an adapter of rank 4."""


def bank(capacity: int, dtype: torch.dtype = torch.float64, copier: Copier | None = None) -> AdapterBank:
    return AdapterBank(SITES, 4, capacity, 8, dtype, torch.device("cpu"), copier)


def staged(into: AdapterBank, rank: int, seed: int, scaling: float = 0.5) -> StagedAdapter:
    """An adapter of ``rank`` on both sites, 16 features in, 8 out."""
    generator = torch.Generator().manual_seed(seed)
    shape = LocalShape(rank, rank, 1, 1, 16, 8)
    factors = {
        name: (
            LocalFactors(
                shape,
                torch.randn(rank, 16, generator=generator, dtype=torch.float64),
                torch.randn(rank, 8, generator=generator, dtype=torch.float64),
            ),
            scaling,
        )
        for name in SITES
    }
    return into.stage(factors)


def answer(of: AdapterBank, slot: int) -> torch.Tensor:
    """What a slot adds at both sites."""
    of.token_slot.fill_(slot)
    of.before_step([slot])
    x = torch.linspace(-1, 1, 16, dtype=torch.float64, device=of.pool.device).view(1, 16)
    y = torch.zeros_like(x[:, :8])
    return torch.cat(
        [lora_apply(x, y, of.pool, of.slots, of.scales, of.token_slot, [site], 4, [8]) for site in range(2)]
    )


def test_factors_start_at_aligned_offsets() -> None:
    """A kernel loads 16 bytes at a time from the start of a factor."""
    own = bank(4096)
    own.write(0, staged(own, 3, seed=0), 0)
    own.write(1, staged(own, 1, seed=1), own.used_elements())
    used = own.slots[:, :2, [SlotField.A_OFFSET, SlotField.B_OFFSET]]
    assert not (used % 16).any()


@pytest.mark.parametrize("bounce", [16, 100, 10**6], ids=["small pieces", "odd pieces", "one piece"])
@pytest.mark.parametrize("gap", [16, SIZE, 3 * SIZE])
def test_moving_keeps_what_a_slot_answers(bounce: int, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the old and the new place overlap."""
    monkeypatch.setattr(bank_module, "_BOUNCE_BYTES", 8 * bounce)
    own = bank(8 * SIZE)
    own.write(0, staged(own, 4, seed=0), gap)
    own.write(1, staged(own, 4, seed=1), gap + SIZE)
    kept = [answer(own, slot).clone() for slot in range(2)]
    own.move([Move(0, gap, 0, SIZE), Move(1, gap + SIZE, SIZE, SIZE)])
    own.pool[2 * SIZE :].fill_(torch.nan)
    assert all(torch.equal(answer(own, slot), kept[slot]) for slot in range(2))


def test_a_forward_waits_for_its_own_slots_only() -> None:
    copier = LateCopier()
    own = bank(4096, copier=copier)
    own.write(0, staged(own, 4, seed=0), 0)
    own.write(1, staged(own, 4, seed=1), SIZE)
    plain = bank(4096)
    plain.write(0, staged(plain, 4, seed=0), 0)
    assert torch.equal(answer(own, 0), answer(plain, 0))
    assert len(copier.queue) == 1, "the other upload is still on its way"


def test_a_move_waits_for_what_is_on_its_way() -> None:
    copier = LateCopier()
    own = bank(4096, copier=copier)
    own.write(0, staged(own, 4, seed=0), SIZE)
    own.move([Move(0, SIZE, 0, SIZE)])
    plain = bank(4096)
    plain.write(0, staged(plain, 4, seed=0), 0)
    assert torch.equal(answer(own, 0), answer(plain, 0))


def test_room_that_is_freed_while_its_upload_is_on_its_way_can_be_used_again() -> None:
    """The upload that was not waited for must not come after its successor's."""
    copier = LateCopier()
    own = bank(4096, copier=copier)
    own.write(0, staged(own, 4, seed=0), 0)
    own.clear(0)
    own.write(0, staged(own, 4, seed=1), 0)
    plain = bank(4096)
    plain.write(0, staged(plain, 4, seed=1), 0)
    assert torch.equal(answer(own, 0), answer(plain, 0))
    assert not copier.queue


def test_a_cleared_slot_adds_nothing() -> None:
    own = bank(4096)
    own.write(0, staged(own, 4, seed=0), 0)
    assert answer(own, 0).abs().max() > 0
    own.clear(0)
    assert not answer(own, 0).any()
    assert own.used_elements() == 0


def test_a_fingerprint_tells_factors_and_scales_apart() -> None:
    own = bank(1)
    first = staged(own, 4, seed=0).fingerprint()
    assert staged(own, 4, seed=0).fingerprint() == first
    assert staged(own, 4, seed=1).fingerprint() != first
    assert staged(own, 4, seed=0, scaling=0.25).fingerprint() != first


def test_a_value_that_overflows_is_refused() -> None:
    own = bank(4096, torch.float16)
    shape = LocalShape(1, 1, 1, 1, 16, 8)
    huge = LocalFactors(shape, torch.full((1, 16), 1e6), torch.ones(1, 8))
    with pytest.raises(AdapterError, match="overflows"):
        own.stage({"first": (huge, 1.0)})


class HostCopies(TorchFunctionMode):
    """Targets of copies from a staged adapter, which lies in the host's memory."""

    def __init__(self, staged: StagedAdapter) -> None:
        super().__init__()
        self._sources = [staged.chunk, staged.rows, staged.scales]
        self.targets: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and any(args[1] is source for source in self._sources):
            self.targets.append(args[0])
        return func(*args, **(kwargs or {}))


def test_an_upload_asks_the_device_for_no_memory() -> None:
    """By then its slot has been given to it. torch takes some where elements lie apart; a slot's rows of tables do."""
    own = bank(4096)
    newcomer = staged(own, 4, seed=0)
    with HostCopies(newcomer) as copies:
        own.write(2, newcomer, 32)
    assert len(copies.targets) == 3
    assert all(target.is_contiguous() for target in copies.targets)
    assert not own.slots[:, 2].is_contiguous()
    assert torch.equal(own.scales[:, 2], newcomer.scales)
    assert (own.slots[:, 2, SlotField.A_OFFSET] == newcomer.rows[:, SlotField.A_OFFSET] + 32).all()
