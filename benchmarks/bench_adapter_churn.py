"""Many adapters over a small pool: rows that choose by Zipf's law, real processes, every row checked against PEFT.

    python benchmarks/bench_adapter_churn.py                      SmolLM2, 200 adapters, room for 16, 2,000 steps, N = 3
    python benchmarks/bench_adapter_churn.py --model tiny --steps 100 --adapters 40 --pool 8

Each of the batch's rows keeps its adapter for some steps; then another request with another adapter takes its place. A
step is one forward of one token a row, which is what a decode step is but for its cache. A quarter of the adapters each
is block-diagonal of rank 6, ordinary of rank 4, ordinary on two projections, and block-diagonal of rank 12. What host
memory does not hold is read from disk when it is used. A hit is a request whose adapter is resident as it begins. The
logits of every row of every step are
compared with what PEFT, eager and on one process, makes of that row's token and adapter.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners import BdLoraConfig
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import bdlora_compile as bd
from bdlora_compile.backend import bdlora

COLUMN = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ROW = ["o_proj", "down_proj"]
MEAN_STEPS = 8
"""Steps that a row keeps its adapter for, on average."""
TOLERANCE = 1e-3
"""Relative, of float32 logits of a model of 30 layers summed in another order; an adapter's neighbours differ by more
than 1e-2, which the check at the end holds against them."""
TINY = LlamaConfig(
    hidden_size=48,
    intermediate_size=96,
    num_attention_heads=6,
    num_key_value_heads=3,
    num_hidden_layers=2,
    vocab_size=256,
)


def kinds(blocks: int) -> Mapping[str, LoraConfig]:
    """The kinds of adapters, by name."""
    block_diagonal = BdLoraConfig(target_modules_bd_a=ROW, target_modules_bd_b=COLUMN, nblocks=blocks)
    both = ROW + COLUMN
    return {
        "blocks6": LoraConfig(r=2 * blocks, lora_alpha=8, target_modules=both, use_bdlora=block_diagonal),
        "plain4": LoraConfig(r=4, lora_alpha=8, target_modules=both),
        "plain8qv": LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "blocks12": LoraConfig(r=4 * blocks, lora_alpha=8, target_modules=both, use_bdlora=block_diagonal),
    }


def prepare(folder: Path, options: argparse.Namespace) -> Path:
    """Write the model and the adapters, and PEFT's logits [adapters, vocabulary] of each one's token; the model."""
    model = folder / "model"
    torch.manual_seed(0)
    if options.model == "tiny":
        plain = LlamaForCausalLM(TINY)
        for parameter in plain.parameters():
            torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
        plain.save_pretrained(model)
    else:
        model = Path(options.model)
    wrapped: Any = None
    for kind, config in kinds(options.tp).items():
        if wrapped is None:
            base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            wrapped = get_peft_model(base, config, adapter_name=kind)
        else:
            wrapped.add_adapter(kind, config)
    wrapped.eval()
    expected = [
        adapter(wrapped, index, folder, options) for index in track(range(options.adapters), description="adapters")
    ]
    torch.save(torch.stack(expected), folder / "expected.pt")
    return model


@torch.no_grad()
def adapter(wrapped: PeftModel, index: int, folder: Path, options: argparse.Namespace) -> Tensor:
    """Write adapter ``index``, and what PEFT makes of its token."""
    kind = list(kinds(options.tp))[index % 4]
    wrapped.set_adapter(kind)
    generator = torch.Generator().manual_seed(index)
    std = 0.15 if options.model == "tiny" else 0.05
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * std
        for name, tensor in get_peft_model_state_dict(wrapped, adapter_name=kind).items()
    }
    set_peft_model_state_dict(wrapped, tensors, adapter_name=kind)
    out = folder / f"a{index}"
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    wrapped.peft_config[kind].save_pretrained(out)
    assert set(load_file(out / "adapter_model.safetensors")) == set(tensors)
    return wrapped(torch.tensor([[token_of(index)]]), use_cache=False).logits[0, 0].clone()  # type: ignore[no-any-return]


def token_of(index: int) -> int:
    """The token that rows with this adapter carry."""
    return 3 + index * 7 % 250


def rows_of_steps(options: argparse.Namespace) -> Iterator[list[int]]:
    """The adapter of each row at each step; the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.arange(1, options.adapters + 1, dtype=torch.float64) ** -options.exponent

    def draw() -> int:
        return int(torch.multinomial(weights, 1, generator=generator))

    rows = [draw() for _ in range(options.rows)]
    for _ in range(options.steps):
        yield list(rows)
        ended = torch.rand(options.rows, generator=generator) < 1 / MEAN_STEPS
        rows = [draw() if end else row for row, end in zip(rows, ended.tolist(), strict=True)]


@dataclass
class Tally:
    """What the steps came to, on one rank.

    Attributes:
        seconds: of each step, adapters brought in.
        requests, hits: rows that began, and those whose adapter was resident.
        worst: largest relative error against PEFT.
        nearest: smallest relative distance to another adapter's logits of that token.
    """

    seconds: list[float] = field(default_factory=list)
    requests: int = 0
    hits: int = 0
    worst: float = 0.0
    nearest: float = float("inf")


@torch.no_grad()
def serve(folder: Path, options: argparse.Namespace) -> None:
    """One rank: load all, run the steps, print."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=1800))
    first = dist.get_rank() == 0
    location = [str(prepare(folder, options)) if first else ""]
    dist.broadcast_object_list(location)
    expected = torch.load(folder / "expected.pt")
    start = time.perf_counter()
    model, adapters = bd.load(
        location[0], max_adapters=options.pool, max_rank=max(8, 4 * options.tp), host_bytes=options.host_bytes
    )
    model.compile(backend=bdlora, options={"inner": options.inner})
    for index in range(options.adapters):
        adapters.load(f"a{index}", folder / f"a{index}")
    seconds_to_load = time.perf_counter() - start
    with adapters.use("a0"):
        model(torch.full((options.rows, 1), token_of(0)))
    graphs, before = len(bd.reports(model)), adapters.stats()
    tally, former = Tally(), [-1] * options.rows
    for rows in rows_of_steps(options):
        ids = torch.tensor([[token_of(row)] for row in rows])
        new = [row for row, old in zip(rows, former, strict=True) if row != old]
        former = rows
        tally.requests += len(new)
        tally.hits += sum(adapters[f"a{row}"].is_resident for row in new)
        start = time.perf_counter()
        with adapters.use([f"a{row}" for row in rows]):
            logits = model(ids).logits[:, 0]
        tally.seconds.append(time.perf_counter() - start)
        scale = expected[rows].abs().max()
        tally.worst = max(tally.worst, float((logits - expected[rows]).abs().max() / scale))
        others = [(row + 4) % options.adapters for row in rows]
        tally.nearest = min(tally.nearest, float((logits - expected[others]).abs().amax(1).min() / scale))
        assert tally.worst < TOLERANCE, f"relative error {tally.worst:.2e} in step {len(tally.seconds)}"
        if first and len(tally.seconds) in {options.steps, *range(0, options.steps, 250)}:
            show(options, before, adapters.stats(), tally)
    if first:
        print(f"loaded and checked in {seconds_to_load:.1f} s; recompiles {len(bd.reports(model)) - graphs}")
    assert tally.nearest > 10 * TOLERANCE, f"adapters are too alike to be told apart: {tally.nearest:.2e}"
    assert len(bd.reports(model)) == graphs, "something was compiled again"
    dist.destroy_process_group()


def show(options: argparse.Namespace, before: bd.AdapterStats, after: bd.AdapterStats, tally: Tally) -> None:
    """Print what the steps took."""
    misses, reads = after.misses - before.misses, after.disk_reads - before.disk_reads
    stall = after.stall_seconds - before.stall_seconds
    evictions, moves = after.evictions - before.evictions, after.compactions - before.compactions
    median = sorted(tally.seconds)[len(tally.seconds) // 2]
    print(f"{date.today()}, N = {options.tp}, {after.known} adapters, {after.slots} slots")
    print(f"of a rank: {after.pool_bytes / 1e6:.1f} MB of pool, {after.host_bytes / 1e6:.1f} MB of host memory")
    print(f"{len(tally.seconds)} steps of {options.rows} rows, {1e3 * median:.1f} ms in the median")
    print(f"{tally.requests} requests, hit rate {tally.hits / tally.requests:.3f}")
    print(f"{misses} adapters brought in, {evictions} evicted, {reads} read from disk, {moves} compactions")
    print(f"stalled {stall:.2f} s of {sum(tally.seconds):.1f} s, {1e3 * stall / max(misses, 1):.2f} ms an adapter")
    print(
        f"worst relative error against PEFT {tally.worst:.1e}; another adapter is {tally.nearest:.1e} away", flush=True
    )


def main() -> int:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a Hugging Face folder, or `tiny`; SmolLM2 by default")
    parser.add_argument("--adapters", type=int, default=200, help="adapters that are known")
    parser.add_argument("--pool", type=int, default=16, help="adapters that can be resident")
    parser.add_argument("--host-bytes", type=int, help="of a rank, for copies of adapters; four times the pool")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--steps", type=int, default=2000, help="forwards")
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law")
    parser.add_argument("--tp", type=int, default=3, help="processes")
    parser.add_argument("--inner", choices=["eager", "inductor"], default="eager", help="what runs a rank's graph")
    parser.add_argument("--folder", type=Path, help="for the model and the adapters; a temporary one by default")
    options = parser.parse_args()
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        serve(options.folder, options)
        return 0
    if not options.model:
        sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
        from smollm2 import checkpoint  # an example, not a part of the package

        options.model = str(checkpoint(Path(__file__).parent.parent / ".demo" / "SmolLM2-135M-Instruct"))
    with tempfile.TemporaryDirectory() as temporary:
        given = {name: value for name, value in vars(options).items() if name != "folder" and value is not None}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.tp}"]
        command += [__file__, "--folder", str(options.folder or temporary)]
        command += [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
