"""What compiling costs: Dynamo's tracing, the passes, and reading and compiling the regions.

    python -m benchmarks.bench_compile                                    32 and 80 narrow layers, one forward each
    python -m benchmarks.bench_compile --layers 8 32 --inner eager
    python -m benchmarks.bench_compile --config llama-3.1-70b --tp 8      rank 0 of 8 of a real shape, cold and warm

Every line is a process of its own. In the first form Inductor's caches are off, and the last line is the ratio of all
that is not Dynamo's between the most and the fewest layers: alike layers are compiled once, so it should be near 1. In
the second a process that finds no cache on disk is followed by one that finds what the first left: a prompt and a
decode step, each with and without adapters, weights that read as zeros, the other ranks a fake group.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

import bdlora_compile as bd
from bdlora_compile.backend import bdlora
from bdlora_compile.census import Census
from bdlora_compile.ir import Origin
from benchmarks.decode.files import model_config, write_sparse_model


def measure_layers(layers: int, inner: str) -> dict[str, Any]:
    """Seconds of the first forward of a narrow model of ``layers``, by part."""
    # Imported first: what importing Inductor takes is not what is asked for.
    importlib.import_module("torch._inductor.compile_fx")
    inductor_config = importlib.import_module("torch._inductor.config")
    inductor_config.force_disable_caches = True
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=layers,
        vocab_size=256,
    )
    model, _ = bd.attach(LlamaForCausalLM(config), max_rank=8)
    model.compile(backend=bdlora, options={"inner": inner})
    ids = torch.randint(3, 250, (2, 16))
    return {"layers": layers, **parts_of(model, lambda: model(ids))}


def measure_rank(name: str, ranks: int, inner: str, folder: Path, caches: Path) -> dict[str, Any]:
    """Seconds until a prompt and a decode step have run on rank 0 of a model, by part, and what was compiled."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"] = str(caches), str(caches / "triton")
    importlib.import_module("torch._inductor.compile_fx")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model_config(name, None)
    model, _ = bd.load(folder, device=device, dtype=torch.bfloat16, max_adapters=4, max_rank=16)
    model.compile(backend=bdlora, options={"inner": inner})
    cache = bd.make_cache(model, 4, 64)

    def forwards() -> None:
        for length in (16, 1):
            ids = torch.ones(4, length, dtype=torch.int64, device=device)
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits.sum().item()

    found = {"model": name, "tp": ranks, "layers": config.num_hidden_layers, **parts_of(model, forwards)}
    dist.destroy_process_group()
    return found


def parts_of(model: Any, forwards: Callable[[], object]) -> dict[str, Any]:
    """Seconds of the first forwards, graphs, and the collectives of a layer in the last of them."""
    start = time.perf_counter()
    with torch.no_grad():
        forwards()
    total = time.perf_counter() - start
    reports = bd.reports(model)
    passes, emit = sum(report.pass_seconds for report in reports), sum(report.emit_seconds for report in reports)
    census: Census = reports[-1].stages[-1].census
    return {
        "total_s": round(total, 2),
        "dynamo_s": round(total - passes - emit, 2),
        "passes_s": round(passes, 2),
        "emit_s": round(emit, 2),
        "graphs": len(reports),
        "traced": sorted({report.tracing for report in reports}),
        "base_collectives": sorted(set(census.per_layer(Origin.BASE))),
        "lora_collectives": sorted(set(census.per_layer(Origin.LORA))),
    }


def in_process(task: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """A task's result, from a process of its own; prints it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        row = pool.apply(task, arguments)
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 80], help="numbers of narrow layers")
    parser.add_argument("--config", help="a known configuration, whole, instead of narrow layers")
    parser.add_argument("--tp", type=int, default=8, help="ranks, of which one is run")
    parser.add_argument("--inner", choices=["eager", "inductor"], default="inductor", help="what compiles the regions")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"{date.today()}, {name}, {os.cpu_count()} cores, torch {torch.__version__}, {options.inner}", flush=True)
    if options.config:
        with tempfile.TemporaryDirectory() as folder:
            write_sparse_model(model_config(options.config, None), Path(folder) / "model")
            for state in ("cold", "warm"):
                print(state, end=" ", flush=True)
                arguments = (options.config, options.tp, options.inner, Path(folder) / "model", Path(folder) / "caches")
                in_process(measure_rank, *arguments)
        return
    rows = [in_process(measure_layers, layers, options.inner) for layers in options.layers]
    rest = [(row["layers"], row["passes_s"] + row["emit_s"]) for row in rows]
    (fewest, least), (most, largest) = min(rest), max(rest)
    print(f"{most} layers cost {largest / least:.2f} times {fewest} layers, without Dynamo's tracing")


if __name__ == "__main__":
    main()
