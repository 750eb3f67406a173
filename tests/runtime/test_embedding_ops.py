"""The lookup of an embedding's A, against a one-hot product in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdlora_compile.factors import LocalFactors, LocalShape
from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.runtime.embedding_ops import lora_lookup, token_grid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTH, OUT, WIDTH = 11, 6, 5


def filled(ranks: list[int]) -> tuple[AdapterBank, list[Tensor]]:
    """A bank with an adapter for each rank (0: none at this site), and each A [r, LENGTH]."""
    bank = AdapterBank(("embed",), max(len(ranks), 1), 4000, 64, torch.float64, DEVICE)
    factors = [torch.randn(rank, LENGTH, dtype=torch.float64) for rank in ranks]
    for slot, a in enumerate(factors):
        shape = LocalShape(a.shape[0], a.shape[0], 1, 1, LENGTH, OUT)
        local = LocalFactors(shape, a.t(), torch.randn(a.shape[0], OUT, dtype=torch.float64))
        bank.write(slot, bank.stage({"embed": (local, 1.0)} if a.shape[0] else {}), bank.used_elements())
    return bank, factors


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, WIDTH), min_size=1, max_size=4), st.integers(1, 9))
def test_lookup_equals_a_one_hot_product(seed: int, ranks: list[int], tokens: int) -> None:
    """Slots of different rank and empty ones, tokens without adapter, ids of other ranks on both sides."""
    torch.manual_seed(seed)
    bank, factors = filled(ranks)
    slots = torch.randint(-1, len(ranks), (tokens,))
    ids = torch.randint(-3, LENGTH + 3, (tokens,))
    bank.token_slot[:tokens] = slots.to(bank.token_slot)
    arguments = (bank.pool, bank.slots, bank.token_slot, [0], WIDTH, LENGTH)
    found = lora_lookup(ids.view(1, -1).to(DEVICE), *arguments).cpu()
    expected = torch.zeros(tokens, WIDTH, dtype=torch.float64)
    for token, (slot, number) in enumerate(zip(slots.tolist(), ids.tolist(), strict=True)):
        if slot >= 0 and 0 <= number < LENGTH:
            expected[token, : ranks[slot]] = factors[slot][:, number]
    assert torch.equal(found, expected)
    # The twin: another id reads another column.
    if expected.any():
        assert not torch.equal(lora_lookup((ids + 1).to(DEVICE), *arguments).cpu(), expected)


def test_fakes_have_the_shapes_of_results() -> None:
    bank, _ = filled([3])
    ids = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(lora_lookup, (ids, bank.pool, bank.slots, bank.token_slot, [0, 0], WIDTH, LENGTH))
    torch.library.opcheck(token_grid, (bank.token_slot, torch.zeros(2, 3, 8, device=DEVICE)))


def test_grid_has_a_slot_for_each_token() -> None:
    bank, _ = filled([3])
    bank.token_slot[:6] = torch.arange(6)
    grid = token_grid(bank.token_slot, torch.zeros(2, 3, 8, device=DEVICE))
    assert grid.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_lookup_can_be_captured() -> None:
    """A CUDA graph that is replayed with other ids and slots reads those."""
    torch.manual_seed(0)
    bank, factors = filled([3, 5])
    ids = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    arguments = (ids, bank.pool, bank.slots, bank.token_slot, [0], WIDTH, LENGTH)
    lora_lookup(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = lora_lookup(*arguments)
    ids.copy_(torch.tensor([2, 3, 4, 5]))
    bank.token_slot[:4] = torch.tensor([1, -1, 0, 1])
    graph.replay()
    assert torch.equal(found[0].cpu(), factors[1][:, 2])
    assert not found[1].any()
    assert torch.equal(found[2, :3].cpu(), factors[0][:, 4])
