"""The Triton kernels against one dense product a token in float64; on a CPU in Triton's interpreter.

Tolerance: factors and y are bf16 or fp16 and are taken as they are by the reference; h is float32, and is rounded to
the factors' dtype by the kernels that use the tensor cores; y is rounded once. So errors are a few units of 2^-8 (bf16)
or 2^-11 (fp16) of the largest value.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdlora_compile.factors import LocalFactors, LocalShape
from bdlora_compile.runtime import bridged_ops
from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.runtime.kernels import launch
from bdlora_compile.runtime.kernels.tiles import Expand, OneLaunch, Plan, Shrink, TwoLaunches, segment_tokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("q", "k", "v")
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SIZE = 16
"""Tokens of a segment here."""


@dataclass(frozen=True)
class Case:
    """Ranks of each slot at each site, and how its factors are packed."""

    ranks: tuple[tuple[int, int, int], ...]
    in_features: int
    out_features: tuple[int, ...]
    a_blocks: int
    b_blocks: int
    tokens: int
    seed: int
    dtype: torch.dtype
    is_strided: bool

    @property
    def width(self) -> int:
        """Columns of h for a site."""
        return max(8, max(max(ranks) for ranks in self.ranks))


def bank_of(case: Case) -> tuple[AdapterBank, dict[tuple[int, int], Tensor]]:
    """A bank with the case's adapters, and each (slot, site)'s scale * B A, dense in float64."""
    torch.manual_seed(case.seed)
    bank = AdapterBank(NAMES, len(case.ranks), 60000, 256, case.dtype, DEVICE)
    dense = {}
    for slot, ranks in enumerate(case.ranks):
        factors = {}
        for site, (rank, out) in enumerate(zip(ranks, case.out_features, strict=False)):
            if rank == 0:
                continue
            fits_a = rank % case.a_blocks == 0 and case.in_features % case.a_blocks == 0
            fits_b = rank % case.b_blocks == 0 and out % case.b_blocks == 0
            a_blocks = case.a_blocks if fits_a else 1
            b_blocks = case.b_blocks if fits_b and a_blocks == 1 else 1
            shape = LocalShape(rank, rank, a_blocks, b_blocks, case.in_features, out)
            a = (torch.randn(rank, case.in_features // a_blocks) / 4).to(case.dtype)
            b = (torch.randn(rank, out // b_blocks) / 4).to(case.dtype)
            factors[NAMES[site]] = (LocalFactors(shape, a, b), 0.25 * (slot + 1))
            dense_a = torch.block_diag(*a.double().chunk(a_blocks))
            dense_b = torch.block_diag(*[block.t() for block in b.double().chunk(b_blocks)])
            dense[slot, site] = 0.25 * (slot + 1) * dense_b @ dense_a
        bank.write(slot, bank.stage(factors), bank.used_elements())
    return bank, dense


PLANS: dict[str, Plan] = {
    "one launch": OneLaunch(rows=8, warps=1),
    "one launch, two rows at once": OneLaunch(rows=2, warps=1),
    "two launches": TwoLaunches(Shrink(rows=4, depth=32, warps=4), Expand(rows=4, columns=64, warps=4)),
    "segments": TwoLaunches(Shrink(16, 32, 4, splits=2), Expand(rows=16, columns=16, warps=4, repeat=2)),
    "segments, one plane": TwoLaunches(Shrink(32, 32, 4), Expand(rows=32, columns=32, warps=4)),
}
FORMS = [*PLANS]


def factors_of(bank: AdapterBank, case: Case) -> launch.Factors:
    """Those of all the case's sites, for its tokens."""
    return launch.Factors(bank.pool, bank.slots, bank.token_slot[: case.tokens], [*range(len(case.out_features))])


def run(case: Case, bank: AdapterBank, x: Tensor, y: Tensor, form: str) -> Tensor:
    """y with all sites' LoRA added by the kernels."""
    factors = factors_of(bank, case)
    work = launch.segment_work(factors.token_slot, SIZE) if form.startswith("segments") else None
    out = y.clone()
    launch.apply_(x, out, factors, bank.scales, work, case.width, case.out_features, PLANS[form])
    return out


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(x, y, slot of each token)."""
    torch.manual_seed(case.seed + 1)
    wide = torch.randn(case.tokens, 2 * case.in_features).to(DEVICE, case.dtype)
    x = wide[:, : case.in_features]
    y = torch.randn(case.tokens, sum(case.out_features)).to(DEVICE, case.dtype)
    slots = torch.randint(-1, len(case.ranks), (case.tokens,))
    return x if case.is_strided else x.contiguous(), y, slots


def expected(case: Case, x: Tensor, y: Tensor, slots: Tensor, dense: dict[tuple[int, int], Tensor]) -> Tensor:
    """The same in float64, token by token."""
    out, x = y.double().cpu().clone(), x.double().cpu()
    for token, slot in enumerate(slots.tolist()):
        start = 0
        for site, size in enumerate(case.out_features):
            if (slot, site) in dense:
                out[token, start : start + size] += dense[slot, site] @ x[token]
            start += size
    return out


def error(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.cpu()
    return float((found.double().cpu() - wanted).abs().max() / wanted.abs().max())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_slots = draw(st.integers(1, 4))
    rank = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 17])
    return Case(
        ranks=tuple(draw(st.tuples(rank, rank, rank)) for _ in range(num_slots)),
        in_features=draw(st.sampled_from([24, 36, 64, 96])),
        out_features=draw(st.sampled_from([(24,), (48, 16), (64, 24, 24), (36, 6)])),
        a_blocks=draw(st.sampled_from([1, 2, 4])),
        b_blocks=draw(st.sampled_from([1, 2, 3])),
        tokens=draw(st.sampled_from([1, 2, 5, 20])),
        seed=draw(st.integers(0, 1000)),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])),
        is_strided=draw(st.booleans()),
    )


@settings(max_examples=25, deadline=None)
@given(cases(), st.sampled_from(FORMS))
def test_kernels_equal_a_dense_product(case: Case, form: str) -> None:
    """Slots of different rank, empty ones, tokens without adapter, packed blocks, odd sizes, x with gaps."""
    if form.startswith("segments") and DEVICE.type == "cpu":
        # Triton's interpreter multiplies the bits of bf16 operands of `dot`; fp16 takes the same path through the code.
        case = replace(case, dtype=torch.float16)
    bank, dense = bank_of(case)
    x, y, slots = inputs(case)
    bank.token_slot[: case.tokens] = slots.to(torch.int32)
    found = run(case, bank, x, y, form)
    assert error(found, expected(case, x, y, slots, dense)) < 4 * ROUNDING[case.dtype]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("blocks", [(1, 1), (2, 1), (1, 2)], ids=["one block", "packed A", "packed B"])
@pytest.mark.parametrize("sizes", [(64, (96, 32)), (36, (36, 12))], ids=["multiples of 8", "others"])
def test_each_branch_of_each_form(form: str, blocks: tuple[int, int], sizes: tuple[int, tuple[int, ...]]) -> None:
    """Random examples may miss one of them; tiles of columns meet several blocks, and blocks several tiles."""
    case = Case(((4, 8, 0), (8, 2, 0)), *sizes, *blocks, 3, 7, torch.float16, False)
    bank, dense = bank_of(case)
    x, y, _ = inputs(case)
    slots = torch.tensor([1, -1, 0])
    bank.token_slot[:3] = slots.to(torch.int32)
    wanted = expected(case, x, y, slots, dense)
    assert error(run(case, bank, x, y, form), wanted) < 4 * ROUNDING[case.dtype]
    assert not error(y, wanted) < 40 * ROUNDING[case.dtype], "LoRA is seen"


PLAIN = Case(((4, 4, 4), (8, 2, 3)), 64, (64, 24, 24), 1, 1, 20, 3, torch.float16, False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", ["scale", "token", "offset"])
def test_damage_is_noticed(damage: str, form: str) -> None:
    """The twins: a scale dropped, a token with another slot, a factor read one row off."""
    bank, dense = bank_of(PLAIN)
    x, y, slots = inputs(PLAIN)
    slots[:2] = torch.tensor([0, 1])
    bank.token_slot[: PLAIN.tokens] = slots.to(torch.int32)
    if damage == "scale":
        bank.scales.fill_(1)
    elif damage == "token":
        bank.token_slot[0] = 1
    else:
        bank.slots[0, 0, 0] += PLAIN.in_features
    found = run(PLAIN, bank, x, y, form)
    assert error(found, expected(PLAIN, x, y, slots, dense)) > 0.02


@pytest.mark.parametrize("grouped", [launch.segment_work, launch._sorted_work], ids=["one launch", "sorted"])
@settings(max_examples=25, deadline=None)
@given(slots=st.lists(st.integers(-1, 5), min_size=1, max_size=150))
def test_segments_hold_every_token_once(grouped: Callable[[Tensor, int], launch.Work], slots: list[int]) -> None:
    """Each token with an adapter is in one segment, of its slot, not longer than allowed; its place knows which."""
    token_slot = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    order, segments, size = grouped(token_slot, 32)
    seen, places = [], [[slots[token], None, 0] for token in order.tolist()]
    for slot, start, count in segments[:, :3].tolist():
        assert count <= size
        members = order[start : start + count].tolist()
        places[start : start + count] = [[slot, start, count]] * count
        assert all(slots[token] == slot for token in members)
        seen += members
    assert not segments[launch.num_segments(len(slots), 6, size) :, :3].any()
    found = segments[:, 3:].tolist()
    assert [[slot, start if slot >= 0 else None, count] for slot, start, count in found] == places
    assert sorted(seen) == [token for token, slot in enumerate(slots) if slot >= 0]


def test_shares_of_several_ranks() -> None:
    """h as a gather brings it: two ranks' shares side by side."""
    case = Case(((8, 4, 2),), 64, (64, 24, 24), 1, 1, 5, 0, torch.bfloat16, False)
    bank, dense = bank_of(case)
    x, y, _ = inputs(case)
    bank.token_slot[:5].fill_(0)
    factors = factors_of(bank, case)
    plan = PLANS["two launches"]
    assert isinstance(plan, TwoLaunches)
    whole = launch.shrink(x, factors, None, 8, plan.shrink, zeroed=True).sum(0)
    gathered = torch.zeros(1, 5, 2 * 3, 8, device=DEVICE)
    for part in range(2):
        for site, rank in enumerate(case.ranks[0]):
            share = rank // 2
            gathered[0, :, part * 3 + site, :share] = whole[:, site, part * share : (part + 1) * share]
    found = y.clone()
    launch.expand(found, gathered, factors, bank.scales, None, case.out_features, 2, plan.expand)
    assert error(found, expected(case, x, y, torch.zeros(5, dtype=torch.int64), dense)) < 4 * ROUNDING[case.dtype]


@pytest.mark.parametrize("tokens", [5, 70])
def test_halves_with_a_collective_between_them(tokens: int) -> None:
    """As the compiled forward of an S-LoRA layout runs them; columns of h that nobody writes are poisoned."""
    case = Case(((8, 4, 2), (3, 0, 8)), 64, (64, 24, 24), 1, 1, tokens, 0, torch.float16, False)
    bank, dense = bank_of(case)
    x, y, _ = inputs(case)
    chosen = torch.arange(tokens, device=DEVICE) % 3 - 1
    slots = bank.token_slot[:tokens].copy_(chosen)
    size = segment_tokens(tokens)
    order, segments = launch.segment_work(slots, size)[:2] if size else (slots, slots)
    shared, sites = (slots, order, segments), [0, 1, 2]
    h = bridged_ops.shrink_by_kernels(x, bank.pool, bank.slots, *shared, sites, 8)
    assert h.shape == (tokens, 24)
    for token, slot in enumerate(chosen.tolist()):
        for site, rank in enumerate(case.ranks[slot] if slot >= 0 else (0, 0, 0)):
            h[token, site * 8 + rank : (site + 1) * 8] = float("nan")
    found = y.clone()
    bridged_ops.expand_by_kernels(found, h, bank.pool, bank.slots, bank.scales, *shared, sites, case.out_features, 1)
    assert error(found, expected(case, x, y, chosen, dense)) < 4 * ROUNDING[case.dtype]
    assert error(y, expected(case, x, y, chosen, dense)) > 40 * ROUNDING[case.dtype], "LoRA is seen"
