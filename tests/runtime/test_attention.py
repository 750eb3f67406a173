"""Attention over rows of different length against a loop over rows and queries in float64, and masks of padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

import bdlora_compile as bd
from bdlora_compile.attention import mask, require_plain_scores
from bdlora_compile.runtime.attention import attention, per_head, row_table
from bdlora_compile.runtime.cache import left_padding

TOLERANCE = 1e-13
"""Both sides are float64 and sum at most 11 products of size one; 4e-16 is measured."""
SCALE = 0.3
ROOM = 11


@dataclass(frozen=True)
class Rows:
    """A batch: padding and tokens held of each row, S new tokens, H query and G kv heads."""

    starts: Sequence[int]
    lengths: Sequence[int]
    seq: int
    heads: int
    groups: int

    def table(self, starts: Sequence[int] | None = None, lengths: Sequence[int] | None = None) -> Tensor:
        """The row table, of other numbers for the twins that must fail."""
        own = torch.tensor(starts or self.starts), torch.tensor(lengths or self.lengths)
        return row_table(*own, self.seq, ROOM)

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v; what is no key of a row is NaN."""
        torch.manual_seed(0)
        batch = len(self.starts)
        q = torch.randn(batch, self.heads, self.seq, 4, dtype=torch.float64)
        k, v = torch.full((2, batch, self.groups, ROOM, 4), float("nan"), dtype=torch.float64).unbind()
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            for x in (k, v):
                x[row, :, start : length + self.seq].normal_()
        return q, k, v

    def expected(self, *, causal: bool = True) -> Tensor:
        """[B, S, H, d], by one softmax for each row, head and query."""
        q, k, v = self.operands()
        out = torch.zeros(len(self.starts), self.seq, self.heads, 4, dtype=torch.float64)
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            for query in range(self.seq):
                keys = slice(start, length + (query if causal else self.seq - 1) + 1)
                for head in range(self.heads if keys.stop > start else 0):
                    group = head * self.groups // self.heads
                    weights = (k[row, group, keys] @ q[row, head, query] * SCALE).softmax(0)
                    out[row, query, head] = weights @ v[row, group, keys]
        return out


CASES = {
    "decode": Rows([0, 2, 0, 0], [5, 7, 0, 10], 1, 8, 2),
    "prompt, padded rows": Rows([0, 3, 1], [0, 0, 0], 5, 4, 4),
    "chunk after tokens": Rows([0, 2, 0], [4, 4, 1], 3, 6, 2),
    "one kv head": Rows([1, 0], [3, 6], 2, 4, 1),
    "a row of padding alone": Rows([4, 0], [0, 0], 3, 4, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_each_row_sees_its_own_keys(name: str) -> None:
    """Poison outside a row's keys must not matter; padding's own queries give zeros."""
    rows = CASES[name]
    table = rows.table()
    for own in (table, per_head(table, rows.groups)):
        found = attention(*rows.operands(), own, SCALE)
        assert (found - rows.expected()).abs().max() < TOLERANCE


def test_each_kv_head_of_a_row_is_a_sequence() -> None:
    """Where the sequences begin that a kernel is given, and how many keys they have."""
    table = row_table(torch.tensor([0, 2]), torch.tensor([5, 7]), 3, ROOM)
    assert table.tolist() == [[0, 3, 6], [0, 13, 22], [8, 8, 0]]
    assert per_head(table, 1).tolist() == table.tolist()
    assert per_head(table, 2).tolist() == [[0, 3, 6, 9, 12], [0, 11, 24, 35, 44], [8, 8, 8, 8, 0]]


def test_twins_are_seen() -> None:
    """A start or a length off by one, or causality dropped, is far outside the tolerance."""
    rows = CASES["chunk after tokens"]
    q, k, v = (x.nan_to_num(1.0) for x in rows.operands())
    for table in (
        rows.table(starts=[1, 3, 1]),
        rows.table(starts=[0, 1, 0]),
        rows.table(lengths=[3, 3, 0]),
        rows.table(lengths=[5, 5, 2]),
    ):
        assert (attention(q, k, v, table, SCALE) - rows.expected()).abs().max() > 1e-3
    whole = rows.expected(causal=False)
    assert (attention(q, k, v, rows.table(), SCALE) - whole).abs().max() > 1e-3


def test_the_operator_is_what_it_says_to_the_compiler() -> None:
    """Shapes and strides of its fake, and nothing that aliases or is written."""
    rows = CASES["decode"]
    torch.library.opcheck(attention, (*rows.operands(), rows.table(), SCALE))


def test_plain_causal_layers_get_a_row_table_others_a_mask() -> None:
    """The mask of any function over rows of different length equals one made row by row."""
    starts, lengths = torch.tensor([0, 2]), torch.tensor([4, 6])
    rows: dict[str, Any] = {
        "batch_size": 2,
        "q_length": 2,
        "kv_length": ROOM,
        "q_offset": lengths,
        "attention_mask": starts,
    }
    assert torch.equal(
        mask(**rows, mask_function=causal_mask_function),
        row_table(starts, lengths, 2, ROOM),
    )
    window = sliding_window_causal_mask_function(3)
    found = mask(**rows, mask_function=window)
    assert found.shape == (2, 1, 2, ROOM)
    for row in range(2):
        for query in range(2):
            at = int(lengths[row]) + query
            seen = [key for key in range(ROOM) if int(starts[row]) <= key <= at and key > at - 3]
            assert found[row, 0, query].nonzero().flatten().tolist() == seen


def test_models_that_cap_scores_are_refused() -> None:
    """No path here computes their attention; transformers' own SDPA would drop the cap."""
    with pytest.raises(bd.ConfigError, match=r"Gemma2Config\.attn_logit_softcapping: found 50"):
        require_plain_scores(Gemma2Config())
    require_plain_scores(LlamaConfig())


def test_padding_at_the_left_is_counted_and_holes_are_refused() -> None:
    """Zeros at the right are allowed where nothing is kept of them."""
    padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert left_padding(padded, allows_right=False).tolist() == [2, 0, 4]
    right = torch.tensor([[0, 1, 1, 0]])
    assert left_padding(right, allows_right=True).tolist() == [1]
    with pytest.raises(bd.ConfigError, match=r"row 0: found 0110, expected zeros at the left only \(a cache"):
        left_padding(right, allows_right=False)
    for allows_right in (False, True):
        with pytest.raises(bd.ConfigError, match=r"row 1: found 1011, .* of your own"):
            left_padding(torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]), allows_right=allows_right)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention runs on GPUs")
@pytest.mark.parametrize("heads", [(16, 4), (4, 1), (8, 8)])
@pytest.mark.parametrize("seq", [1, 7, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 96])
def test_flash_attention_equals_float64(heads: tuple[int, int], seq: int, head_dim: int) -> None:
    """bf16 rounds operands and weights to 8 bits: 3e-3 is measured; a start off by one gives above 0.1."""
    torch.manual_seed(0)
    (num_heads, groups), room = heads, 640
    starts, lengths = torch.tensor([[0, 3, 100, 0], [300, 5, 383, 0]], device="cuda")
    q = torch.randn(4, num_heads, seq, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 4, groups, room, head_dim, device="cuda", dtype=torch.bfloat16)
    expected = attention(q.double(), k.double(), v.double(), row_table(starts, lengths, seq, room), SCALE / 4)
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        for x in (k, v):
            x[row, :, :start] = x[row, :, length + seq :] = float("nan")
    table = row_table(starts, lengths, seq, room)
    for own in (table, per_head(table, groups)):
        found = attention(q, k, v, own, SCALE / 4).double()
        assert (found - expected).abs().max() / expected.abs().max() < 1e-2
    twin = attention(q, k.nan_to_num(), v.nan_to_num(), row_table(starts + 1, lengths, seq, room), SCALE / 4)
    assert (twin.double() - expected).abs().max() / expected.abs().max() > 0.1
