"""Where LoRA of few tokens goes: behind its product or beside it; each product with what reads it.

    python -m benchmarks.bench_lora_beside --json FILE
    python -m benchmarks.bench_lora_beside --tiny            only to see it run, on a CPU

One GPU, rank 0's shapes of N ranks; a group of sites at a time, several layers in a CUDA graph: a kernel that writes x,
the product, and what reads it (the rotation with the write to the cache, the activation, or the norm behind a sum over
one rank). "base" is microseconds of a layer's group without LoRA; the others say what LoRA adds to it:

    behind   in launches behind the product: `lora_apply_`
    added    beside the product on another stream, and added to it in a launch of its own: `lora_linear`
    beside   the same, but what reads the product adds it: `lora_linear_beside`

Every form's result is compared with float64.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdlora_compile.runtime import linear_op
from bdlora_compile.runtime.kernels.tiles import BY_TOKEN_LIMIT
from bdlora_compile.runtime.linear_op import lora_linear, lora_linear_beside, with_delta
from bdlora_compile.runtime.ops import lora_apply_
from bdlora_compile.runtime.rotary_op import rotate_and_cache
from bdlora_compile.runtime.swiglu_op import swiglu
from benchmarks.lora_layers import MODELS, Case, Layers, Model
from benchmarks.replays import replay_us

TOKENS = (1, 4, 16, 24, 32, 48, 64)
KINDS = (("bd", 32, 8), ("rep", 16, 0))
"""Kind, rank and blocks of all ranks together."""
FORMS = ("behind", "added", "beside")
HEAD_DIM, CONTEXT, EPSILON = 128, 512, 1e-5
TOLERANCE = 4 * 2.0**-8
"""Of bf16, relative: the product, LoRA and their sum are rounded, each by half a unit in the last place at most."""


class Readers:
    """What reads each product in a layer, with tensors of its own."""

    def __init__(self, layers: Layers) -> None:
        self.layers, tokens = layers, layers.case.tokens
        like = layers.x[0]
        self.heads, self.kv_heads = (size // HEAD_DIM for size in layers.groups[0].out_features[:2])
        self.cache = like.new_zeros(2, tokens, self.kv_heads, CONTEXT, HEAD_DIM)
        self.lengths = torch.full((tokens,), CONTEXT // 2, device=like.device)
        self.cos, self.sin = like.new_ones(2, 1, 1, HEAD_DIM).unbind()
        self.residual, self.norm = torch.zeros_like(layers.y[1]), like.new_ones(layers.y[1].shape[1])
        self.mailbox = _own_mailbox() if like.is_cuda else None

    def read(self, group: int, y: Tensor, delta: Tensor | None) -> Tensor:
        """One of the four; without ``delta`` y lacks nothing."""
        match self.layers.groups[group].name:
            case "qkv":
                of_rows = (y.unsqueeze(1), self.cos, self.sin, *self.cache.unbind(), self.lengths)
                result: Tensor = rotate_and_cache(*of_rows, self.heads, self.kv_heads, delta)
            case "gate_up":
                result = _activated(y, delta)
            case _:
                result = self._normed(y, delta)
        return result

    def _normed(self, y: Tensor, delta: Tensor | None) -> Tensor:
        if self.mailbox is None:
            return with_delta(y, delta)
        from bdlora_compile.runtime.kernels.launch_norm import reduce_add_norm

        missing = linear_op.missing_from(y, delta)
        return reduce_add_norm(y, self.residual, self.norm, self.mailbox, EPSILON, 0, 1, missing)[1]


def _activated(y: Tensor, delta: Tensor | None) -> Tensor:
    """By one kernel in any case."""
    if not y.is_cuda:
        return swiglu(y, y.new_zeros(BY_TOKEN_LIMIT, y.shape[1]) if delta is None else delta)
    from bdlora_compile.runtime.kernels.launch_swiglu import swiglu as launched

    m = y.new_empty(y.shape[0], y.shape[1] // 2)
    launched(y, m, linear_op.missing_from(y, delta))
    return m


def _own_mailbox() -> Tensor:
    """A mailbox of one rank, in ordinary memory."""
    from bdlora_compile.runtime.kernels.norm import MAILBOX_WORDS

    mailbox = torch.zeros(MAILBOX_WORDS, dtype=torch.int64, device="cuda")
    mailbox[0] = mailbox.data_ptr()
    return mailbox


def product(layers: Layers, layer: int, group: int, form: str) -> tuple[Tensor, Tensor | None]:
    """(y, what it lacks) of a form."""
    x, weight = layers.x[group], layers.weights[layer][group]
    if form == "base":
        return torch.nn.functional.linear(x, weight), None
    sizes, delta = layers.sizes(layer, group), None
    match form:
        case "behind":
            y = torch.nn.functional.linear(x, weight)
            lora_apply_(x, y, *layers.bank, *sizes)
        case "added":
            y = lora_linear(x, weight, None, *layers.bank, *sizes)
        case _:
            y, delta = lora_linear_beside(x, weight, None, *layers.bank, *sizes)
    return y, delta


def error(layers: Layers, group: int, form: str) -> float:
    """Of the first layer's result against float64, relative."""
    y, delta = product(layers, 0, group, form)
    wanted = layers.wanted(group)
    return float((with_delta(y, delta).double() - wanted).norm() / wanted.norm())


def check(layers: Layers, group: int, form: str) -> None:
    """A form is right, and the base product is not: LoRA is far from nothing."""
    found, without = error(layers, group, form), error(layers, group, "base")
    if not found < TOLERANCE < without:
        name = layers.groups[group].name
        raise SystemExit(f"{name}, {form}: error {found:.1e}, without LoRA {without:.1e}, allowed {TOLERANCE:.1e}")


def microseconds(layers: Layers, readers: Readers, group: int, form: str) -> float:
    """A layer's product of one group with what reads it, behind a kernel that writes its x."""

    def run() -> None:
        for layer in range(layers.num_layers):
            layers.arrive(group)
            readers.read(group, *product(layers, layer, group, form))

    if layers.device == "cuda":
        return replay_us(run) / layers.num_layers
    run()
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6 / layers.num_layers


def rows_of(case: Case, device: str) -> Iterator[dict[str, Any]]:
    """A row for each group of sites."""
    layers = Layers(case, device=device)
    readers = Readers(layers)
    for number, group in enumerate(layers.groups):
        base = microseconds(layers, readers, number, "base")
        row: dict[str, Any] = {**asdict(case), "group": group.name, "base": base}
        for form in FORMS:
            check(layers, number, form)
            row[form] = microseconds(layers, readers, number, form) - base
        yield row


def cases(ranks: Sequence[int], tokens: Sequence[int], model: str) -> Iterator[Case]:
    """Adapters as many as tokens, and one for all."""
    for n in ranks:
        for kind, rank, blocks in KINDS:
            for batch in tokens:
                for active in sorted({1, batch}):
                    yield Case(model, n, kind, rank, batch, active, active, max(1, blocks // n))


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    adapters = f"{row['kind']} {row['r']}"
    forms = " ".join(f"{row[form]:9.1f}" for form in FORMS)
    batch = f"{row['tokens']:>3} {row['active']:>3}"
    return f"{row['ranks']:>2}  {adapters:<7} {batch}  {row['group']:<8} {row['base']:8.1f} {forms}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS], default="8B")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8], help="N")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--tiny", action="store_true", help="two layers of small sizes, on whatever is there")
    parser.add_argument("--json", help="results, a JSON line each")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    options = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.tiny:
        MODELS["tiny"] = Model("tiny", 1024, 256, 2048, 2)
        options.model, options.ranks, options.tokens = "tiny", [2], [1, 17]
    print(f"{' N':<3} {'adapters':<7} tok  ad  {'group':<8} {'base':>8} {' '.join(f'{form:>9}' for form in FORMS)}")
    for case in cases(options.ranks, options.tokens, options.model):
        for row in rows_of(case, device):
            print(line(row), flush=True)
            if options.json:
                with Path(options.json).open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
