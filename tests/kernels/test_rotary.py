"""Rotations, the write to the cache and LoRA before them in one launch, against dense products in float64; on a CPU in
the interpreter.

Tolerance, relative to the largest value: y with its LoRA, both products with an angle and their sum are rounded to
fp16, each by half a unit in the last place (2^-11); sums of LoRA are in float32. Without LoRA the interpreter gets the
very bits of PyTorch's own operators, which round where the kernel does; a GPU's compiler may make one operation of a
product and the sum, which rounds once less.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from bdlora_compile.factors import LocalFactors, LocalShape
from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.runtime.kernels import launch, launch_rotary
from bdlora_compile.runtime.kernels.tiles import rotary_heads
from bdlora_compile.runtime.rotary_op import rotate_and_cache
from tests.kernels.test_kernels import DEVICE, error

TOLERANCE = 4 * 2.0**-11
SITES = ("q", "k", "v")
ROOM, PLANES = 9, 3
SLOTS = (0, 1, -1)
"""Of the rows' tokens in turn."""


@dataclass(frozen=True)
class Case:
    """Sizes, ranks of two slots at q, k and v, blocks of their B; heads of a program; new tokens of each of 4 rows."""

    heads: int
    kv_heads: int
    dim: int
    blocks: int
    tile: int
    ranks: tuple[tuple[int, int, int], ...]
    parts: int = 1
    start: int = 0
    seq: int = 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Columns of q, k and v."""
        return self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim


CASES = {
    "one block, several turns": Case(4, 2, 16, 1, 2, ((9, 12, 16), (1, 0, 3))),
    "tiles in a block": Case(4, 2, 16, 2, 1, ((4, 8, 2), (2, 2, 18))),
    "tiles in two blocks, k and v odd": Case(6, 3, 16, 4, 1, ((4, 8, 24), (20, 4, 0))),
    "tiles in two blocks": Case(6, 3, 32, 4, 1, ((4, 8, 24), (20, 4, 4))),
    "a tile in many blocks": Case(8, 4, 16, 4, 4, ((4, 8, 12), (8, 4, 4))),
    "heads that fill no tile": Case(3, 1, 24, 3, 2, ((6, 3, 9), (3, 15, 3))),
    "odd sizes": Case(3, 1, 6, 2, 4, ((4, 2, 6), (2, 4, 2))),
    "parts": Case(4, 2, 16, 2, 2, ((4, 8, 12), (20, 2, 6)), parts=2),
    "parts, odd sizes": Case(3, 1, 6, 2, 2, ((4, 2, 6), (2, 4, 2)), parts=2),
    "B begins later": Case(4, 2, 16, 1, 2, ((3, 2, 4), (2, 5, 1)), start=8),
}


@dataclass
class Call:
    """A case with random factors and inputs, and what is wanted in float64."""

    case: Case
    rows_of_angles: int = 1
    dtype: torch.dtype = torch.float16
    factors: dict[tuple[int, str], LocalFactors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        case, seq = self.case, self.case.seq
        torch.manual_seed(case.heads * case.dim + case.blocks)
        self.lengths = torch.tensor([0, 5, 2, ROOM - seq], device=DEVICE)
        batch = self.lengths.shape[0]
        self.y = torch.randn(batch, seq, sum(case.sizes)).to(DEVICE, self.dtype)
        turns = 6 * torch.rand(self.rows_of_angles, seq, case.dim, device=DEVICE)
        self.cos, self.sin = turns.cos().to(self.dtype), turns.sin().to(self.dtype)
        self.cache = torch.randn(2, batch, case.kv_heads, ROOM, case.dim).to(DEVICE, self.dtype)
        self.token_slot = torch.tensor(SLOTS, dtype=torch.int32, device=DEVICE).repeat(batch * seq)[: batch * seq]
        self._write_factors()
        self.h = self._random_h()

    def _write_factors(self) -> None:
        case = self.case
        self.bank = AdapterBank(SITES, len(case.ranks), 60000, 256, self.dtype, DEVICE)
        for slot, ranks in enumerate(case.ranks):
            for site, rank, size in zip(SITES, ranks, case.sizes, strict=True):
                shape = LocalShape(rank, rank, 1, case.blocks, 8, size, case.start)
                a, b = torch.randn(rank, 8), torch.randn(rank, size // case.blocks) / 4
                if rank:
                    self.factors[slot, site] = LocalFactors(shape, a.to(self.dtype), b.to(self.dtype))
            own = {site: (self.factors[slot, site], 0.5 + slot) for site in SITES if (slot, site) in self.factors}
            self.bank.write(slot, self.bank.stage(own), self.bank.used_elements())

    def _random_h(self) -> Tensor:
        """NaN is what nobody may read: past a slot's share, and of tokens without adapter."""
        width = max(max(ranks) for ranks in self.case.ranks)
        h = torch.randn(PLANES, self.token_slot.shape[0], self.case.parts, 3, width) / 2
        for token, slot in enumerate(self.token_slot.tolist()):
            for site in range(3):
                h[:, token, :, site, self._rank(slot, site) // self.case.parts :] = torch.nan
        return h.flatten(2, 3).to(DEVICE)

    def _rank(self, slot: int, site: int) -> int:
        return self.case.ranks[slot][site] if slot >= 0 else 0

    def run(self, *, expands: bool = True) -> tuple[Tensor, Tensor]:
        """(q, the cache) by the kernel."""
        bank, cache = self.bank, self.cache.clone()
        factors = launch.Factors(bank.pool, bank.slots, self.token_slot, [0, 1, 2])
        missing = launch_rotary.Missing(factors, bank.scales, self.h, self.case.parts) if expands else None
        keys, values = cache.unbind()
        q = launch_rotary.rotate(self.y, (self.cos, self.sin), (keys, values), self.lengths, self.case.heads, missing)
        assert q.transpose(1, 2).is_contiguous()
        return q, cache

    def wanted(self, *, expands: bool = True) -> tuple[Tensor, Tensor]:
        """(q, the cache)."""
        case, y = self.case, self.y.double().cpu().flatten(0, 1)
        parts = y.split(case.sizes, dim=1)
        for token, slot in enumerate(self.token_slot.tolist() if expands else []):
            for site, part in enumerate(parts):
                if (slot, SITES[site]) in self.factors:
                    part[token, case.start :] += (0.5 + slot) * self._b_h(token, slot, site)
        batch = self.lengths.shape[0]
        q, k, v = (part.reshape(batch, case.seq, -1, case.dim).transpose(1, 2) for part in parts)
        return self._rotated(q), self._written(self._rotated(k), v)

    def _b_h(self, token: int, slot: int, site: int) -> Tensor:
        """Of the columns that the site has."""
        dense = torch.block_diag(*self.factors[slot, SITES[site]].b.double().chunk(self.case.blocks))
        shares = self.h.double().cpu().sum(0)[token].unflatten(0, (self.case.parts, 3))[:, site]
        h = shares[:, : dense.shape[0] // self.case.parts].flatten()
        return (h @ dense)[: self.case.sizes[site] - self.case.start]

    def _rotated(self, x: Tensor) -> Tensor:
        half = self.case.dim // 2
        cos, sin = (angles.double().cpu()[:, None] for angles in (self.cos, self.sin))
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    def _written(self, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache.double().cpu()
        for row, length in enumerate(self.lengths.tolist()):
            for i in range(self.case.seq):
                if length + i < ROOM:
                    cache[0, row, :, length + i], cache[1, row, :, length + i] = k[row, :, i], v[row, :, i]
        return cache


def case_of(name: str, monkeypatch: pytest.MonkeyPatch, seq: int) -> Case:
    """The case with so many tokens a row, and tiles as it has them."""
    case = replace(CASES[name], seq=seq)
    monkeypatch.setattr(launch_rotary, "rotary_heads", lambda *_: case.tile)
    return case


@pytest.mark.parametrize(("name", "seq"), [*((name, 1) for name in CASES), ("odd sizes", 3), ("tiles in a block", 3)])
def test_with_lora(name: str, seq: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(case_of(name, monkeypatch, seq))
    q, cache = call.run()
    wanted, wanted_cache = call.wanted()
    assert error(q, wanted) < TOLERANCE
    assert error(cache, wanted_cache) < TOLERANCE
    # The twin: LoRA is no small part of it.
    without, cache_without = call.wanted(expands=False)
    assert not error(q, without) < 10 * TOLERANCE
    assert not error(cache, cache_without) < 10 * TOLERANCE


@pytest.mark.parametrize("name", ["tiles in a block", "heads that fill no tile", "odd sizes"])
@pytest.mark.parametrize(("seq", "rows_of_angles"), [(1, 1), (3, 1), (3, 4)])
def test_without_lora(name: str, seq: int, rows_of_angles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very bits of PyTorch's operators in the interpreter; angles of all rows, or of each."""
    case = case_of(name, monkeypatch, seq)
    call = Call(case, rows_of_angles)
    q, cache = call.run(expands=False)
    exact, _ = call.wanted(expands=False)
    keys, values = call.cache.unbind()
    sizes = (call.lengths, case.heads, case.kv_heads)
    wanted = rotate_and_cache._init_fn(call.y, call.cos, call.sin, keys, values, *sizes)
    if DEVICE.type == "cpu":
        assert torch.equal(q, wanted)
        assert torch.equal(cache, call.cache)
    assert error(q, exact) < TOLERANCE
    assert error(cache, call.cache.double()) < TOLERANCE


@pytest.mark.parametrize("expands", [True, False], ids=["with_lora", "without"])
def test_a_full_row_is_left_alone(expands: bool) -> None:
    """What has no room would be another row's; what has is written, and queries are there in any case."""
    call = Call(Case(4, 2, 16, 2, 2, ((4, 8, 2), (2, 2, 18)), seq=3))
    call.lengths.copy_(torch.tensor([0, ROOM, ROOM - 2, ROOM - 3], device=DEVICE))
    q, cache = call.run(expands=expands)
    wanted, wanted_cache = call.wanted(expands=expands)
    assert error(q, wanted) < TOLERANCE
    assert error(cache, wanted_cache) < TOLERANCE
    assert torch.equal(cache[:, 1], call.cache[:, 1])
    assert not torch.equal(cache[:, 2], call.cache[:, 2])


def test_no_tokens() -> None:
    call = Call(CASES["odd sizes"])
    call.y = call.y[:0]
    q, cache = call.run()
    assert q.shape == (0, 3, 1, 6)
    assert torch.equal(cache, call.cache)


DAMAGES = ("scale", "token", "offset", "turned back", "one place on", "halves")


@pytest.mark.parametrize("name", ["one block, several turns", "tiles in two blocks, k and v odd", "parts"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(name: str, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twins: a scale dropped, tokens with another slot, factors one row off, other angles, another place."""
    case = case_of(name, monkeypatch, 1)
    call = Call(case)
    call.lengths[3] -= 1
    wanted, wanted_cache = call.wanted()
    if damage == "scale":
        call.bank.scales.fill_(3)
    elif damage == "token":
        # No NaN there: another slot's numbers alone are to be noticed.
        call.h.nan_to_num_(0.5)
        call.token_slot.copy_(1 - call.token_slot.clamp(min=0))
    elif damage == "offset":
        call.bank.slots[:, :, 1] += case.sizes[0] // case.blocks
    elif damage == "turned back":
        call.sin.neg_()
    elif damage == "one place on":
        call.lengths += 1
    else:
        call.sin.copy_(call.sin.roll(case.dim // 2, dims=-1))
    q, cache = call.run()
    assert not error(cache, wanted_cache) < 10 * TOLERANCE
    assert damage == "one place on" or not error(q, wanted) < 10 * TOLERANCE


def test_tiles_are_whole_heads() -> None:
    """Two times 4 elements for each of 32 threads, where heads are enough for that."""
    assert rotary_heads(16, 4, 128) == 2
    assert rotary_heads(32, 8, 64) == 4
    assert rotary_heads(8, 1, 256) == 1
    assert rotary_heads(3, 1, 24) == 4, "all of them, and one that is none"
    assert rotary_heads(2, 2, 1024) == 1
