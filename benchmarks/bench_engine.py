"""The engine against a bare decode loop on the same batch: what joining, leaving, texts and streams cost.

    python benchmarks/bench_engine.py                          SmolLM2 with its two adapters, 16 rows, on CPU or one GPU
    python benchmarks/bench_engine.py --model FOLDER --adapter math=FOLDER --rows 32 --new-tokens 256 --dtype bfloat16

The loop prefills all prompts in one forward, then feeds the likeliest tokens back; nothing leaves the device. The
engine gets the same prompts as requests. Both are timed from the first prompt to the last token, in turns, in one
process; the best run of each counts. Prompts have one length, so that the loop needs no padding and does no work that
the engine spares.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import bdlora_compile as bd
from bdlora_compile.serving.engine import Engine
from bdlora_compile.serving.requests import Request, SamplingParams

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Load:
    """One batch: prompts [rows, length] and each row's adapter."""

    prompts: torch.Tensor
    names: list[str | None]
    new_tokens: int

    @property
    def length(self) -> int:
        """Tokens that a row holds at the end."""
        return self.prompts.shape[1] + self.new_tokens


@torch.no_grad()
def bare_loop(model: Any, adapters: bd.AdapterSet, load: Load) -> tuple[float, list[list[int]]]:
    """Seconds, and the tokens of each row."""
    cache = bd.make_cache(model, len(load.names), -(-load.length // 64) * 64)
    device = cache.lengths.device
    tokens = load.prompts.to(device)
    chosen = []
    start = time.perf_counter()
    with adapters.use(load.names):
        for _ in range(load.new_tokens):
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            chosen.append(tokens)
    found = torch.cat(chosen, 1).tolist()
    return time.perf_counter() - start, found


def through_engine(engine: Engine, load: Load) -> tuple[float, list[list[int]]]:
    """The same."""
    sampling = SamplingParams(temperature=0, max_tokens=load.new_tokens, ignore_eos=True)
    start = time.perf_counter()
    streams = [
        engine.submit(Request(tuple(prompt), name, sampling))
        for prompt, name in zip(load.prompts.tolist(), load.names, strict=True)
    ]
    found = [list(stream.result().ids) for stream in streams]
    return time.perf_counter() - start, found


def main() -> int:
    """Print tokens per second of both and their ratio; 1 if it is below --least."""
    options = _parse()
    folder, paths = options.model, dict(pair.split("=", 1) for pair in options.adapter)
    if folder is None:
        sys.path.insert(0, str(ROOT / "examples"))
        from smollm2 import checkpoint

        folder = checkpoint(ROOT / ".demo" / "SmolLM2-135M-Instruct")
        paths = {path.name: path for path in sorted((ROOT / "examples" / "adapters").iterdir()) if path.is_dir()}
    model, adapters = bd.load(folder, paths, dtype=getattr(torch, options.dtype) if options.dtype else None)
    model.compile(backend="bdlora")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 1000, (options.rows, options.prompt_tokens), generator=generator)
    choices: list[str | None] = [None, *paths]
    load = Load(prompts, [choices[row % len(choices)] for row in range(options.rows)], options.new_tokens)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with Engine(model, adapters, tokenizer, max_rows=options.rows, max_length=load.length) as engine:
        times: dict[str, list[float]] = {"loop": [], "engine": []}
        for run in range(options.runs + 1):
            steps = engine.stats().decode_steps
            loop, expected = bare_loop(model, adapters, load)
            taken, found = through_engine(engine, load)
            steps = engine.stats().decode_steps - steps
            same = sum(a == b for a, b in zip(expected, found, strict=True))
            print(f"run {run}: loop {loop:.2f} s, engine {taken:.2f} s in {steps} decode steps, {same} rows equal")
            # The first run compiles, and records CUDA graphs.
            if run:
                times["loop"].append(loop)
                times["engine"].append(taken)
    total = options.rows * options.new_tokens
    rates = {name: total / min(seconds) for name, seconds in times.items()}
    ratio = rates["engine"] / rates["loop"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{device}, {model.dtype}, {options.rows} rows, prompts of {options.prompt_tokens} tokens, "
        f"{options.new_tokens} new ones"
    )
    print(f"loop {rates['loop']:.0f} tokens/s, engine {rates['engine']:.0f} tokens/s, ratio {ratio:.3f}")
    return int(ratio < options.least)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--least", type=float, default=0.0, help="ratio below which the exit status is 1")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
