"""The operators that rotate and write to the cache: what they tell the compiler, and what it makes of them."""

import re

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from bdlora_compile.runtime.attention import attention, row_table
from bdlora_compile.runtime.rotary_op import rotate_and_cache, rotate_and_cache_lora

HEADS, KV_HEADS, DIM, ROOM = 4, 2, 8, 9


def inputs(seq: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, cos, sin, a layer of a cache, and rows' lengths."""
    torch.manual_seed(seq)
    y = torch.randn(3, seq, (HEADS + 2 * KV_HEADS) * DIM, dtype=dtype)
    cos, sin = torch.randn(2, 1, seq, DIM, dtype=dtype).unbind()
    keys, values = (torch.randn(3, KV_HEADS, ROOM, DIM, dtype=dtype) for _ in range(2))
    return y, cos, sin, keys, values, torch.tensor([0, 5, ROOM - seq])


@pytest.mark.parametrize("seq", [1, 2])
def test_the_operators_are_what_they_say_to_the_compiler(seq: int) -> None:
    torch.library.opcheck(rotate_and_cache, (*inputs(seq), HEADS, KV_HEADS))
    slots, scales = torch.tensor([[[0, 0, 2, 2, 1, 1, 0]]]).repeat(3, 1, 1), torch.ones(3, 1)
    bank = (torch.randn(64).half(), slots, scales, torch.tensor([0, -1, 0] * seq, dtype=torch.int32))
    h = torch.randn(2, 3 * seq, 3, 2)
    sizes = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
    call = (*inputs(seq, torch.float16), HEADS, KV_HEADS, h, *bank, [0, 1, 2], sizes, 1)
    torch.library.opcheck(rotate_and_cache_lora, call)


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
