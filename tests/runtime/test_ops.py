"""The LoRA operators alone, against one dense product a token in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdlora_compile.factors import LocalFactors, LocalShape
from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.runtime.ops import lora_apply, lora_expand, lora_shrink

IN, OUT = 24, (12, 6)
NAMES = ("q", "k")
Dense = dict[tuple[int, int], Tensor]


def filled(seed: int, ranks: list[tuple[int, int]], blocks: int) -> tuple[AdapterBank, Dense]:
    """A bank of one adapter for each pair of ranks, and s B A of each (slot, site), dense."""
    torch.manual_seed(seed)
    bank = AdapterBank(NAMES, max(len(ranks), 1), 20000, 64, torch.float64, torch.device("cpu"))
    dense: Dense = {}
    for slot, pair in enumerate(ranks):
        factors = {}
        for site, (name, rank, out) in enumerate(zip(NAMES, pair, OUT, strict=True)):
            if rank == 0:
                continue
            c = blocks if rank % blocks == 0 else 1
            shape = LocalShape(rank, rank, 1, c, IN, out)
            a = torch.randn(rank, IN, dtype=torch.float64)
            b = torch.randn(rank, out // c, dtype=torch.float64)
            scaling = 0.25 * (slot + 1)
            factors[name] = (LocalFactors(shape, a, b), scaling)
            whole = torch.block_diag(*[block.t() for block in b.chunk(c)])
            dense[slot, site] = scaling * whole @ a
        bank.write(slot, bank.stage(factors), bank.used_elements())
    return bank, dense


def expected(x: Tensor, y: Tensor, tokens: Tensor, dense: Dense) -> Tensor:
    out = y.clone()
    for token, slot in enumerate(tokens.tolist()):
        for site, start in enumerate((0, OUT[0])):
            if (slot, site) in dense:
                out[token, start : start + OUT[site]] += dense[slot, site] @ x[token]
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 9),
    st.booleans(),
)
def test_apply_equals_a_dense_product(
    seed: int, ranks: list[tuple[int, int]], blocks: int, tokens: int, is_strided: bool
) -> None:
    """Slots of different rank, empty ones, tokens without adapter, packed blocks, x with gaps between its rows."""
    bank, dense = filled(seed, ranks, blocks)
    slots = torch.randint(-1, len(ranks), (tokens,))
    bank.token_slot[:tokens] = slots.to(torch.int32)
    wide = torch.randn(tokens, 2 * IN, dtype=torch.float64)
    x = wide[:, :IN] if is_strided else wide[:, :IN].contiguous()
    y = torch.randn(tokens, sum(OUT), dtype=torch.float64)
    before = y.clone()
    arguments = (bank.pool, bank.slots, bank.scales, bank.token_slot)
    found = lora_apply(x, y, *arguments, [0, 1], 6, list(OUT))
    # Sums of at most 24 x 6 products in float64.
    assert (found - expected(x, y, slots, dense)).abs().max() < 1e-11
    assert torch.equal(y, before)


def test_shares_of_several_ranks_are_read_side_by_side() -> None:
    """h of two ranks as a gather brings it: rank-major, each with an equal share of every slot's rank."""
    bank, dense = filled(0, [(4, 2)], 1)
    bank.token_slot[:3] = 0
    x, y = torch.randn(3, IN, dtype=torch.float64), torch.zeros(3, sum(OUT), dtype=torch.float64)
    h = lora_shrink(x, bank.pool, bank.slots, bank.token_slot, [0, 1], 4).unflatten(1, (2, 4))
    shares = [torch.zeros(3, 2, 4, dtype=torch.float64) for _ in range(2)]
    for rank, share in enumerate(shares):
        share[:, 0, :2] = h[:, 0, 2 * rank : 2 * rank + 2]
        share[:, 1, :1] = h[:, 1, rank : rank + 1]
    gathered = torch.cat([share.flatten(1) for share in shares], dim=1)
    found = lora_expand(y, gathered, bank.pool, bank.slots, bank.scales, bank.token_slot, [0, 1], list(OUT), 2)
    assert (found - expected(x, y, torch.zeros(3, dtype=torch.int64), dense)).abs().max() < 1e-11


@pytest.mark.parametrize("damage", ["scale", "token", "offset"])
def test_damage_is_noticed(damage: str) -> None:
    """The twins: a scale dropped, a token with its neighbour's slot, a factor read one row off."""
    bank, dense = filled(0, [(4, 2), (3, 3)], 1)
    slots = torch.tensor([0, 1, 0])
    bank.token_slot[:3] = slots.to(torch.int32)
    if damage == "scale":
        bank.scales.fill_(1)
    elif damage == "token":
        bank.token_slot[1] = 0
    else:
        bank.slots[0, 0, 0] += IN
    x, y = torch.randn(3, IN, dtype=torch.float64), torch.zeros(3, sum(OUT), dtype=torch.float64)
    found = lora_apply(x, y, bank.pool, bank.slots, bank.scales, bank.token_slot, [0, 1], 4, list(OUT))
    assert (found - expected(x, y, slots, dense)).abs().max() > 0.1
