"""The adapter bank alone: where factors lie, what a full pool refuses, what compaction keeps."""

import pytest
import torch

from bdlora_compile.errors import AdapterError
from bdlora_compile.factors import LocalFactors, LocalShape
from bdlora_compile.runtime.bank import AdapterBank, StagedAdapter
from bdlora_compile.runtime.ops import SlotField, lora_apply

SITES = ("first", "second")


def bank(capacity: int, dtype: torch.dtype = torch.float64) -> AdapterBank:
    return AdapterBank(SITES, 4, capacity, 8, dtype, torch.device("cpu"))


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
    x = torch.linspace(-1, 1, 16, dtype=torch.float64).view(1, 16)
    y = torch.zeros(1, 8, dtype=torch.float64)
    return torch.cat(
        [lora_apply(x, y, of.pool, of.slots, of.scales, of.token_slot, [site], 4, [8]) for site in range(2)]
    )


def test_factors_start_at_aligned_offsets() -> None:
    """A kernel loads 16 bytes at a time from the start of a factor."""
    own = bank(4096)
    own.write(0, staged(own, 3, seed=0))
    own.write(1, staged(own, 1, seed=1))
    used = own.slots[:, :2, [SlotField.A_OFFSET, SlotField.B_OFFSET]]
    assert not (used % 16).any()


def test_compaction_keeps_what_every_slot_answers() -> None:
    """Room is left in two pieces; the third adapter needs both, and the neighbours are moved, not lost."""
    size = staged(bank(1), 4, seed=0).chunk.numel()
    own = bank(3 * size)
    for slot in range(3):
        own.write(slot, staged(own, 4, seed=slot))
    kept = answer(own, 1)
    own.clear(0)
    own.clear(2)
    large = StagedAdapter(
        torch.cat([staged(own, 4, seed=7).chunk, torch.zeros(size, dtype=torch.float64)]),
        staged(own, 4, seed=7).rows,
        staged(own, 4, seed=7).scales,
    )
    own.write(3, large)
    assert torch.equal(answer(own, 1), kept)
    alone = bank(4 * size)
    alone.write(3, staged(alone, 4, seed=7))
    assert torch.equal(answer(own, 3), answer(alone, 3))


def test_a_full_pool_refuses_and_changes_nothing() -> None:
    size = staged(bank(1), 4, seed=0).chunk.numel()
    own = bank(size + 15)
    own.write(0, staged(own, 4, seed=0))
    before = own.pool.clone(), own.slots.clone(), own.scales.clone()
    with pytest.raises(AdapterError, match="15 free elements"):
        own.write(1, staged(own, 4, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(before, (own.pool, own.slots, own.scales), strict=True))


def test_a_cleared_slot_adds_nothing() -> None:
    own = bank(4096)
    own.write(0, staged(own, 4, seed=0))
    assert answer(own, 0).abs().max() > 0
    own.clear(0)
    assert not answer(own, 0).any()
    assert own.used_elements() == 0


def test_a_value_that_overflows_is_refused() -> None:
    own = bank(4096, torch.float16)
    shape = LocalShape(1, 1, 1, 1, 16, 8)
    huge = LocalFactors(shape, torch.full((1, 16), 1e6), torch.ones(1, 8))
    with pytest.raises(AdapterError, match="overflows"):
        own.stage({"first": (huge, 1.0)})
