"""Attention of a decode step and of a prompt on one GPU: rank 0's heads of Llama-3.1-8B on N ranks.

    python -m benchmarks.bench_attention --json FILE

Prints a JSON line for each case: microseconds of a layer in a CUDA graph (median of groups), for `bdlora::attention`
and for what else PyTorch has, beside the time that reading the rows' keys and values once takes; and the error against
float64, with NaN in the cache wherever a row has no key. A graph holds several layers with caches of their own, so that
these come from memory.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bdlora_compile.runtime.attention import attention, per_head, row_table
from benchmarks.replays import replay_us

HEAD_DIM, HEADS, KV_HEADS = 128, 32, 8
MEMORY_BANDWIDTH, LAUNCH = 3.1e12, 1.6e-6
"""Bytes in a second and seconds of a node, measured on an H100 (`bdlora_compile/machines/h100-nvlink.json`)."""


@dataclass(frozen=True)
class Case:
    """Rows of a batch on rank 0 of N.

    Attributes:
        ranks: N.
        batch: rows.
        length: tokens that the longest row holds, the new ones included.
        room: tokens that the cache has room for.
        seq: new tokens of a row.
        mixed: whether rows hold from an eighth of ``length`` upwards, the last row all of it.
    """

    ranks: int
    batch: int
    length: int
    room: int
    seq: int = 1
    mixed: bool = False

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, the new ones included."""
        if not self.mixed:
            return [self.length] * self.batch
        shortest = max(self.length // 8, self.seq)
        return [shortest + (self.length - shortest) * row // (self.batch - 1) for row in range(self.batch)]

    def floor_us(self) -> float:
        """Reading keys and values of all rows once."""
        size = 2 * sum(self.lengths) * KV_HEADS // self.ranks * HEAD_DIM * 2
        return (LAUNCH + size / MEMORY_BANDWIDTH) * 1e6


CASES = [
    *(Case(n, b, length, length) for n in (2, 8) for length in (512, 4096) for b in (1, 16, 64)),
    Case(2, 16, 512, 4096),
    Case(8, 64, 4096, 4096, mixed=True),
    Case(2, 16, 4096, 8192, mixed=True),
    Case(2, 1, 2048, 2048, seq=2048),
    Case(8, 8, 512, 1024, seq=256, mixed=True),
]


class Layers:
    """Queries and caches of several layers, enough to leave the GPU's cache cold."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        groups, heads = KV_HEADS // case.ranks, HEADS // case.ranks
        size = 2 * case.batch * case.room * groups * HEAD_DIM * 2
        count = max(2, min(32, (200 << 20) // size))
        shape = (count, 2, case.batch, groups, case.room, HEAD_DIM)
        self.caches = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.queries = torch.randn(
            count, case.batch, case.seq, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16
        ).transpose(2, 3)
        lengths = torch.tensor(case.lengths, device="cuda")
        table = row_table(torch.zeros_like(lengths), lengths - case.seq, case.seq, case.room)
        self.rows = per_head(table, groups)
        key, query = torch.arange(case.room, device="cuda"), torch.arange(case.seq, device="cuda")
        last = (lengths - case.seq)[:, None] + query
        self.mask = (key <= last[:, :, None])[:, None]
        self.lengths = lengths

    def us(self, call: Callable[[Tensor, Tensor, Tensor], Any]) -> float:
        """Microseconds of a layer."""

        def step() -> None:
            for query, (key, value) in zip(self.queries, self.caches, strict=True):
                call(query, key, value)

        return replay_us(step) / len(self.queries)

    def error(self) -> float:
        """Of our operator against float64, with NaN where a row has no key; largest difference over largest value."""
        query, (key, value) = self.queries[0], self.caches[0].clone()
        for x in (key, value):
            for row, length in enumerate(self.case.lengths):
                x[row, :, length:] = float("nan")
        found = attention(query, key, value, self.rows, HEAD_DIM**-0.5).double()
        worst, largest = 0.0, 0.0
        for row, length in enumerate(self.case.lengths):
            k, v = (x[row : row + 1, :, :length].double() for x in (key, value))
            mask = self.mask[row : row + 1, :, :, :length]
            expected = F.scaled_dot_product_attention(
                query[row : row + 1].double(), k, v, attn_mask=mask, scale=HEAD_DIM**-0.5, enable_gqa=True
            )
            worst = max(worst, float((found[row] - expected[0].transpose(0, 1)).abs().max()))
            largest = max(largest, float(expected.abs().max()))
        return worst / largest if found.isfinite().all() else float("nan")


def candidates(layers: Layers) -> dict[str, Callable[[Tensor, Tensor, Tensor], Any]]:
    """Our operator and the others that give the same result (those marked "reads all" only for full rows)."""
    scale = HEAD_DIM**-0.5
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
        "rows": lambda q, k, v: attention(q, k, v, layers.rows, scale),
        "sdpa_mask": lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=layers.mask, scale=scale, enable_gqa=True
        ),
        "sdpa_mask_repeated": lambda q, k, v: _repeated(q, k, v, layers.mask, scale),
        "cudnn_mask": lambda q, k, v: _cudnn(q, k, v, layers.mask, scale),
    }
    if layers.case.seq == 1:
        found["flash_padded_reads_all"] = lambda q, k, v: torch.ops.aten._flash_attention_forward(
            *(x.transpose(1, 2) for x in (q, k, v)), None, None, 1, layers.case.room, 0.0, False, False, scale=scale
        )
    return found


def _repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """What transformers does where SDPA cannot group heads under a mask."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def flex(layers: Layers) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """FlexAttention, compiled, with a block mask of the rows' lengths made outside of what is timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    last = layers.lengths - layers.case.seq

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= last[row] + query

    case = layers.case
    block_mask = create_block_mask(sees, case.batch, None, case.seq, case.room, device="cuda")
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, scale=HEAD_DIM**-0.5, enable_gqa=True)


def measure(case: Case, with_flex: bool) -> dict[str, Any]:
    """One line."""
    layers = Layers(case)
    line: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, **asdict(case)}
    line |= {"error": layers.error(), "floor_us": round(case.floor_us(), 2)}
    calls = candidates(layers)
    if with_flex:
        calls["flex"] = flex(layers)
    for name, call in calls.items():
        try:
            line[f"{name}_us"] = round(layers.us(call), 2)
        except Exception as error:
            torch.cuda.synchronize()
            line[f"{name}_error"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return line


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--flex", action="store_true", help="FlexAttention too, which compiles for each case")
    options = parser.parse_args(arguments)
    with torch.no_grad():
        for case in CASES:
            line = measure(
                case, options.flex and case.batch == 16 and (case.mixed or case.room == 512) and case.ranks == 2
            )
            print(json.dumps(line), flush=True)
            with options.json.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
