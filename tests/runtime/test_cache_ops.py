"""The operator that writes to the cache: against loops, by the kernel in Triton's interpreter, compiled in place."""

import re

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from bdlora_compile.runtime.attention import attention, row_table
from bdlora_compile.runtime.cache_ops import cache_write_

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOM = 9


def inputs(seq: int, heads: int = 3, head_dim: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A layer of a cache, new keys as a transpose (as projections give them), new values, and rows' lengths."""
    torch.manual_seed(seq)
    keys, values = torch.randn(2, 4, heads, ROOM, head_dim, device=DEVICE).unbind()
    k = torch.randn(4, seq, heads, head_dim, device=DEVICE).transpose(1, 2)
    v = torch.randn(4, heads, seq, head_dim, device=DEVICE)
    return keys, values, k, v, torch.tensor([0, 5, 2, ROOM - seq], device=DEVICE)


def expected(cache: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
    """Token by token."""
    out = cache.clone()
    for row, start in enumerate(lengths.tolist()):
        for i in range(new.shape[2]):
            out[row, :, start + i] = new[row, :, i]
    return out


@pytest.mark.parametrize("seq", [1, 3])
@pytest.mark.parametrize("heads", [1, 3])
def test_rows_are_written_where_they_end(seq: int, heads: int) -> None:
    keys, values, k, v, lengths = inputs(seq, heads)
    wanted = expected(keys, k, lengths), expected(values, v, lengths)
    untouched = keys.clone()
    cache_write_(keys, values, k, v, lengths)
    assert torch.equal(keys, wanted[0])
    assert torch.equal(values, wanted[1])
    # The twin: one place further on would be noticed.
    assert not torch.equal(expected(untouched, k, (lengths - 1).clamp(min=0)), keys)


@pytest.mark.parametrize("seq", [1, 3])
def test_the_kernel_writes_the_same(seq: int) -> None:
    """In Triton's interpreter on a CPU, on the GPU where there is one."""
    pytest.importorskip("triton")
    from bdlora_compile.runtime.kernels.cache import write_tokens_

    keys, values, k, v, lengths = inputs(seq)
    wanted = expected(keys, k, lengths), expected(values, v, lengths)
    write_tokens_(keys, values, k, v, lengths)
    assert torch.equal(keys, wanted[0])
    assert torch.equal(values, wanted[1])


def test_the_operator_is_what_it_says_to_the_compiler() -> None:
    torch.library.opcheck(cache_write_, inputs(2))


@pytest.mark.parametrize("is_in_place", [True, False])
def test_inductor_copies_no_layer_of_the_cache(is_in_place: bool) -> None:
    """What a compiled graph writes, it writes in place; the twin copies a layer, which the test has to see."""
    torch._dynamo.reset()
    keys, values, k, v, lengths = inputs(1)
    # As regions are compiled: the compiler does not know that both are parts of one tensor.
    keys, values = keys.clone(), values.clone()
    rows = row_table(torch.zeros_like(lengths), lengths, 1, ROOM)

    def layer(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        cache_write_(keys, values, k * 2, v * 2, lengths)
        if not is_in_place:
            values.copy_(keys.flip(0))
        return attention(k, keys, values, rows, 1.0)

    wanted = expected(keys, k * 2, lengths)
    # A graph that was compiled before is kept on disk, whether its inputs share memory or not.
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
        _, code = run_and_get_code(torch.compile(layer), keys, values, k, v, lengths, rows)
    copies = re.findall(r"(?:fused|(?<!to))_(?:copy|clone)_\w*", "\n".join(code))
    assert bool(copies) != is_in_place, copies
    assert torch.equal(keys, wanted)
