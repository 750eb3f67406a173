"""The operator that rotates and writes to the cache: what it tells the compiler, and what that makes of it."""

import re

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from bdlora_compile.runtime.attention import attention, row_table
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.runtime.rotary_op import rotate_and_cache

HEADS, KV_HEADS, DIM, ROOM = 4, 2, 8, 9


def inputs(
    seq: int, dtype: torch.dtype = torch.float32, rows: int = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, cos, sin, a layer of a cache, and rows' lengths."""
    torch.manual_seed(seq)
    y = torch.randn(rows, seq, (HEADS + 2 * KV_HEADS) * DIM, dtype=dtype)
    cos, sin = torch.randn(2, 1, seq, DIM, dtype=dtype).unbind()
    keys, values = (torch.randn(rows, KV_HEADS, ROOM, DIM, dtype=dtype) for _ in range(2))
    return y, cos, sin, keys, values, torch.tensor([0, min(5, ROOM - seq), ROOM - seq]).repeat(rows // 3)


@pytest.mark.parametrize("seq", [1, 2, 6])
def test_the_operator_is_what_it_says_to_the_compiler(seq: int) -> None:
    """With what y lacks and without; of more than few tokens that is not read."""
    torch.library.opcheck(rotate_and_cache, (*inputs(seq), HEADS, KV_HEADS))
    y, *others = inputs(seq, torch.float16)
    delta = torch.randn(BY_TOKEN_LIMIT, y.shape[-1], dtype=y.dtype)
    torch.library.opcheck(rotate_and_cache, (y, *others, HEADS, KV_HEADS, delta))


@pytest.mark.parametrize(("rows", "seq", "is_added"), [(3, 5, True), (12, 5, True), (12, 6, False)])
def test_few_tokens_get_what_y_lacks(rows: int, seq: int, is_added: bool) -> None:
    """The bits of a rotation of their sum; of 60 tokens, not of 72."""
    y, cos, sin, *cache, lengths = inputs(seq, torch.float16, rows)
    delta = torch.randn(BY_TOKEN_LIMIT, y.shape[-1], dtype=y.dtype)
    delta[rows * seq :] = torch.nan
    total = y + delta[: rows * seq].view_as(y) if is_added else y
    caches = [torch.stack(cache) for _ in range(2)]
    found = rotate_and_cache(y, cos, sin, *caches[0].unbind(), lengths, HEADS, KV_HEADS, delta)
    wanted = rotate_and_cache(total, cos, sin, *caches[1].unbind(), lengths, HEADS, KV_HEADS)
    assert torch.equal(found, wanted)
    assert torch.equal(*caches)
    without = rotate_and_cache(y, cos, sin, *caches[1].unbind(), lengths, HEADS, KV_HEADS)
    assert torch.equal(found, without) is not is_added


@pytest.mark.parametrize("is_in_place", [True, False])
def test_inductor_copies_no_layer_of_the_cache(is_in_place: bool) -> None:
    """As `test_cache_ops` has it for the write alone."""
    torch._dynamo.reset()
    y, cos, sin, keys, values, lengths = inputs(1)
    rows = row_table(torch.zeros_like(lengths), lengths, 1, ROOM)

    def layer(y: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        q = rotate_and_cache(y * 2, cos, sin, keys, values, lengths, HEADS, KV_HEADS)
        if not is_in_place:
            values.copy_(keys.flip(0))
        return attention(q, keys, values, rows, 1.0)

    caches = keys.clone(), values.clone()
    wanted = layer(y, cos, sin, *caches, lengths)
    # A graph that was compiled before is kept on disk, whether its inputs share memory or not.
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
        found, code = run_and_get_code(torch.compile(layer), y, cos, sin, keys, values, lengths)
    copies = re.findall(r"(?:fused|(?<!to))_(?:copy|clone)_\w*", "\n".join(code))
    assert bool(copies) != is_in_place, copies
    assert torch.equal(found, wanted)
    assert torch.equal(keys, caches[0])
