"""Rotations, the write to the cache and what is added before them in one launch, against float64; on a CPU in the
interpreter.

Tolerance, relative to the largest value: y with its delta, both products with an angle and their sum are rounded to
fp16, each by half a unit in the last place (2^-11). The interpreter gets the very bits of PyTorch's own operators,
which round where the kernel does; a GPU's compiler may make one operation of a product and the sum, which rounds once
less.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bdlora_compile.runtime.kernels import launch_rotary
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT, rotary_heads
from bdlora_compile.runtime.rotary_op import rotate_and_cache
from tests.kernels.test_kernels import DEVICE, error

TOLERANCE = 4 * 2.0**-11
ROOM = 9


@dataclass(frozen=True)
class Case:
    """Sizes; heads of a program; new tokens of each of 4 rows."""

    heads: int
    kv_heads: int
    dim: int
    tile: int
    seq: int = 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Columns of q, k and v."""
        return self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim


CASES = {
    "several heads": Case(4, 2, 16, 2),
    "one head": Case(6, 3, 32, 1),
    "all heads of k": Case(8, 4, 16, 4),
    "heads that fill no tile": Case(3, 1, 24, 2),
    "odd sizes": Case(3, 1, 6, 4),
    "odd sizes, several programs": Case(3, 1, 6, 2),
}


class Call:
    """A case with random inputs, and what is wanted in float64. NaN is what nobody may read."""

    def __init__(self, case: Case, rows_of_angles: int = 1) -> None:
        self.case = case
        torch.manual_seed(case.heads * case.dim + case.seq)
        self.lengths = torch.tensor([0, 5, 2, ROOM - case.seq], device=DEVICE)
        batch = self.lengths.shape[0]
        self.tokens = batch * case.seq
        self.y = torch.randn(batch, case.seq, sum(case.sizes)).to(DEVICE, torch.float16)
        self.delta = torch.randn(BY_TOKEN_LIMIT, sum(case.sizes)).to(DEVICE, torch.float16)
        self.delta[self.tokens :] = torch.nan
        turns = 6 * torch.rand(rows_of_angles, case.seq, case.dim, device=DEVICE)
        self.cos, self.sin = turns.cos().half(), turns.sin().half()
        self.cache = torch.randn(2, batch, case.kv_heads, ROOM, case.dim).to(DEVICE, torch.float16)

    def run(self, *, adds: bool = True) -> tuple[Tensor, Tensor]:
        """(q, the cache) by the kernel."""
        cache, delta = self.cache.clone(), self.delta if adds else None
        keys, values = cache.unbind()
        q = launch_rotary.rotate(self.y, (self.cos, self.sin), (keys, values), self.lengths, self.case.heads, delta)
        assert q.transpose(1, 2).is_contiguous()
        return q, cache

    def by_operators(self, *, adds: bool = True) -> tuple[Tensor, Tensor]:
        """(q, the cache) by PyTorch's."""
        cache, delta = self.cache.clone(), self.delta if adds else None
        sizes = (self.lengths, self.case.heads, self.case.kv_heads)
        return rotate_and_cache._init_fn(self.y, self.cos, self.sin, *cache.unbind(), *sizes, delta), cache

    def wanted(self, *, adds: bool = True) -> tuple[Tensor, Tensor]:
        """(q, the cache)."""
        case, y = self.case, self.y.double().cpu()
        if adds:
            y = y + self.delta[: self.tokens].double().cpu().view_as(y)
        q, k, v = (part.unflatten(2, (-1, case.dim)).transpose(1, 2) for part in y.split(case.sizes, dim=2))
        return self._rotated(q), self._written(self._rotated(k), v)

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


@pytest.mark.parametrize("adds", [True, False], ids=["with_delta", "without"])
@pytest.mark.parametrize(("seq", "rows_of_angles"), [(1, 1), (3, 1), (3, 4)])
@pytest.mark.parametrize("name", CASES)
def test_rotated_and_written(
    name: str, seq: int, rows_of_angles: int, adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very bits of PyTorch's operators in the interpreter; angles of all rows, or of each."""
    call = Call(case_of(name, monkeypatch, seq), rows_of_angles)
    (q, cache), (wanted, wanted_cache) = call.run(adds=adds), call.wanted(adds=adds)
    if DEVICE.type == "cpu":
        assert all(map(torch.equal, (q, cache), call.by_operators(adds=adds)))
    assert error(q, wanted) < TOLERANCE
    assert error(cache, wanted_cache) < TOLERANCE
    # The twin: delta is no small part of it.
    other, other_cache = call.wanted(adds=not adds)
    assert not error(q, other) < 10 * TOLERANCE
    assert not error(cache, other_cache) < 10 * TOLERANCE


@pytest.mark.parametrize("adds", [True, False], ids=["with_delta", "without"])
def test_a_full_row_is_left_alone(adds: bool) -> None:
    """What has no room would be another row's; what has is written, and queries are there in any case."""
    call = Call(Case(4, 2, 16, 2, seq=3))
    call.lengths.copy_(torch.tensor([0, ROOM, ROOM - 2, ROOM - 3], device=DEVICE))
    q, cache = call.run(adds=adds)
    wanted, wanted_cache = call.wanted(adds=adds)
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


DAMAGES = ("scale", "token", "column", "q", "k", "v", "turned back", "one place on", "halves")


@pytest.mark.parametrize("name", ["several heads", "heads that fill no tile", "odd sizes"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(name: str, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twins: delta scaled, another token's, one column on, left out at a site; other angles, another place."""
    call = Call(case_of(name, monkeypatch, 1))
    call.lengths[3] -= 1
    wanted, wanted_cache = call.wanted()
    harm(call, damage)
    q, cache = call.run()
    assert (error(q, wanted) < TOLERANCE) is (damage in ("k", "v", "one place on"))
    assert (error(cache, wanted_cache) < TOLERANCE) is (damage == "q")


def harm(call: Call, damage: str) -> None:
    """Change what the kernel reads."""
    if damage == "scale":
        call.delta *= 1.05
    elif damage == "token":
        call.delta[: call.tokens] = call.delta[: call.tokens].roll(1, dims=0)
    elif damage == "column":
        call.delta = call.delta.roll(1, dims=1)
    elif damage in ("q", "k", "v"):
        call.delta.split(call.case.sizes, dim=1)["qkv".index(damage)].zero_()
    elif damage == "turned back":
        call.sin.neg_()
    elif damage == "one place on":
        call.lengths += 1
    else:
        call.sin.copy_(call.sin.roll(call.case.dim // 2, dims=-1))


def test_tiles_are_whole_heads() -> None:
    """Two times 4 elements for each of 32 threads, where heads are enough for that."""
    assert rotary_heads(16, 4, 128) == 2
    assert rotary_heads(32, 8, 64) == 4
    assert rotary_heads(8, 1, 256) == 1
    assert rotary_heads(3, 1, 24) == 4, "all of them, and one that is none"
    assert rotary_heads(2, 2, 1024) == 1
