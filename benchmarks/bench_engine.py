"""The engine against a bare decode loop on the same batch: what joining, leaving, texts and streams cost.

    python -m benchmarks.bench_engine                          SmolLM2 with its adapters, 16 rows, on CPU or one GPU
    python -m benchmarks.bench_engine --shapes llama-3.1-8b    random weights and adapters; nothing is downloaded
    python -m benchmarks.bench_engine --model FOLDER --adapter math=FOLDER --rows 32 --new-tokens 256 --dtype bfloat16

The loop prefills all prompts in one forward, then feeds the likeliest tokens back; nothing leaves the device. The
engine gets the same prompts as requests. Both are timed in turns, in one process; the best run of each counts. "all" is
from the first prompt to the last token, "decode" from the first token of all rows on, "processor" all again, in seconds
of the processor: on a CPU that other work shares, clocks say little. Prompts have one length, so that the loop needs no
padding and does no work that the engine spares. Rows are called equal whose tokens are all the loop's: with random
weights in bf16 these may be few, since prompts go in alone in the engine and together in the loop. So the engine's
tokens are held against transformers and PEFT in float32, row by row.

On a GPU "waits" is the engine that reads the tokens of each step before it launches the next one. Its tokens are the
engine's own.
"""

import argparse
import gc
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import bdlora_compile as bd
from bdlora_compile.backend import bdlora
from bdlora_compile.serving.batch import Batch
from bdlora_compile.serving.engine import Engine
from bdlora_compile.serving.requests import Request, SamplingParams, Token
from benchmarks.decode.files import CONTENTS, AdapterKind, model_config, roomy_folder, write_adapters, write_model
from benchmarks.decode.reference import greedy_choices

ROOT = Path(__file__).resolve().parents[1]
KIND = AdapterKind(32, 8)
"""Of random adapters: the paper's."""


@dataclass(frozen=True)
class Files:
    """What is served: a model's folder, its adapters, its tokenizer."""

    model: Path
    adapters: dict[str, Path]
    tokenizer: Any


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


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        first: seconds until all rows had their first token.
        whole: seconds until all rows had their last one.
        processor: seconds of this process on its processors, all threads.
        tokens: of each row.
    """

    first: float
    whole: float
    processor: float
    tokens: list[list[int]]

    @property
    def decode(self) -> float:
        """Seconds of all tokens but the first."""
        return self.whole - self.first


@torch.no_grad()
def bare_loop(model: Any, adapters: bd.AdapterSet, load: Load) -> Run:
    """A user's loop, which reads no token before the end."""
    cache = bd.make_cache(model, len(load.names), -(-load.length // 64) * 64)
    device = cache.lengths.device
    tokens = load.prompts.to(device)
    chosen, first = [], 0.0
    start, processor = time.perf_counter(), time.process_time()
    with adapters.use(load.names):
        for number in range(load.new_tokens):
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            chosen.append(tokens)
            if not number:
                tokens.tolist()
                first = time.perf_counter() - start
    found = torch.cat(chosen, 1).tolist()
    return Run(first, time.perf_counter() - start, time.process_time() - processor, found)


def through_engine(engine: Engine, load: Load) -> Run:
    """The same by requests and streams."""
    sampling = SamplingParams(temperature=0, max_tokens=load.new_tokens, ignore_eos=True)
    start, processor = time.perf_counter(), time.process_time()
    streams = [
        engine.submit(Request(tuple(prompt), name, sampling))
        for prompt, name in zip(load.prompts.tolist(), load.names, strict=True)
    ]
    firsts = [next(iter(stream)) for stream in streams]
    first = time.perf_counter() - start
    rest = [stream.result().ids for stream in streams]
    whole, processor = time.perf_counter() - start, time.process_time() - processor
    tokens = [[one.id, *ids] for one, ids in zip(firsts, rest, strict=True) if isinstance(one, Token)]
    return Run(first, whole, processor, tokens)


def main() -> int:
    """Print tokens per second of both and their ratio.

    Returns:
        1 if the ratio is below --least (that of "all" on a GPU, of "processor" on a CPU), or if a token is wrong.
    """
    options = _parse()
    dtype = getattr(torch, options.dtype) if options.dtype else None
    with files_of(options, dtype) as files:
        return compare(files, options, dtype)


@contextmanager
def files_of(options: argparse.Namespace, dtype: torch.dtype | None) -> Iterator[Files]:
    """Files that were named, random ones, or SmolLM2's."""
    if options.shapes is not None:
        with random_files(options, dtype) as files:
            yield files
    elif options.model is not None:
        adapters = {name: Path(path) for name, path in (pair.split("=", 1) for pair in options.adapter)}
        yield Files(Path(options.model), adapters, AutoTokenizer.from_pretrained(options.model))
    else:
        sys.path.insert(0, str(ROOT / "examples"))
        from smollm2 import checkpoint

        folder = checkpoint(ROOT / ".demo" / "SmolLM2-135M-Instruct")
        adapters = {path.name: path for path in sorted((ROOT / "examples" / "adapters").iterdir()) if path.is_dir()}
        yield Files(folder, adapters, AutoTokenizer.from_pretrained(folder))


@contextmanager
def random_files(options: argparse.Namespace, dtype: torch.dtype | None) -> Iterator[Files]:
    """A model of known shapes (in bf16 on a GPU), adapters, and a tokenizer in which token i is the text "<i>"."""
    config = model_config(options.shapes, options.layers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    num_bytes = dtype.itemsize * config.num_hidden_layers * config.hidden_size * 4 * config.intermediate_size
    folder = roomy_folder(num_bytes)
    try:
        (folder / "model").mkdir()
        write_model(config, folder / "model", dtype, device)
        write_adapters({"bd": KIND}, config, folder / "adapters", dtype, device)
        adapters = {path.name: path for path in sorted((folder / "adapters").iterdir())[:CONTENTS]}
        words = Tokenizer(models.WordLevel({f"<{token}>": token for token in range(config.vocab_size)}, "<0>"))
        words.decoder = decoders.Fuse()
        yield Files(folder / "model", adapters, PreTrainedTokenizerFast(tokenizer_object=words))
    finally:
        shutil.rmtree(folder)


def compare(files: Files, options: argparse.Namespace, dtype: torch.dtype | None) -> int:
    """Run both in turns; the exit status."""
    model, adapters = bd.load(files.model, files.adapters, dtype=dtype)
    model.compile(backend=bdlora)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 1000, (options.rows, options.prompt_tokens), generator=generator)
    choices: list[str | None] = [None, *files.adapters]
    load = Load(prompts, [choices[row % len(choices)] for row in range(options.rows)], options.new_tokens)
    runs: dict[str, list[Run]] = {
        name: [] for name in ("loop", "engine", *(["waits"] if torch.cuda.is_available() else []))
    }
    with Engine(model, adapters, files.tokenizer, max_rows=options.rows, max_length=load.length) as engine:
        for number in range(options.runs + 1):
            found = {"loop": bare_loop(model, adapters, load), "engine": through_engine(engine, load)}
            if "waits" in runs:
                with patch.object(Batch, "runs_behind", False):
                    found["waits"] = through_engine(engine, load)
            same = {
                name: sum(a == b for a, b in zip(found[name].tokens, found["engine"].tokens, strict=True))
                for name in found
                if name != "engine"
            }
            times = ", ".join(f"{name} {run.whole:.3f} s (first {run.first:.3f})" for name, run in found.items())
            print(f"run {number}: {times}; rows equal to the engine's: {same}", flush=True)
            # The first run compiles, and records CUDA graphs.
            if number:
                for name, run in found.items():
                    runs[name].append(run)
    status = _report(model, options, runs)
    del model, adapters, engine
    gc.collect()
    folders = [None if name is None else files.adapters[name] for name in load.names]
    tokens = torch.tensor(found["engine"].tokens)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choices = greedy_choices(files.model, folders, prompts, tokens, dtype or torch.float32, device)
    print(f"the engine's {choices.text}")
    return int(status or choices.gap > choices.allowed)


def _report(model: Any, options: argparse.Namespace, runs: dict[str, list[Run]]) -> int:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{options.shapes or options.model or 'SmolLM2-135M-Instruct'}, {device}, {model.dtype}, torch "
        f"{torch.__version__}, {options.rows} rows, prompts of {options.prompt_tokens} tokens, {options.new_tokens} new"
    )
    ratios = {}
    parts: dict[str, Callable[[Run], float]] = {
        "all": lambda run: run.whole,
        "decode": lambda run: run.decode,
        "processor": lambda run: run.processor,
    }
    for part, seconds_of in parts.items():
        best = {name: min(map(seconds_of, found)) for name, found in runs.items()}
        count = options.new_tokens - (part == "decode")
        rates = {name: options.rows * count / seconds for name, seconds in best.items()}
        ratios[part] = rates["engine"] / rates["loop"]
        columns = "; ".join(
            f"{name} {rate:.1f} tokens/s, {1e3 * best[name] / count:.2f} ms a step" for name, rate in rates.items()
        )
        print(f"{part:>9}: {columns}; ratio {ratios[part]:.3f}")
    return int(ratios["all" if torch.cuda.is_available() else "processor"] < options.least)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder with weights and tokenizer")
    parser.add_argument("--shapes", default=None, help="random weights in these shapes, see `bdlora explain --config`")
    parser.add_argument("--layers", type=int, default=None, help="with --shapes: this many instead of all")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--least", type=float, default=0.0, help="ratio below which the exit status is 1")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
