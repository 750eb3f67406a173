"""What compiling costs, by number of layers: Dynamo's tracing, the passes, and reading and compiling the regions.

    python benchmarks/bench_compile.py                         CPU Inductor, 32 and 80 narrow layers, one forward
    python benchmarks/bench_compile.py --layers 8 32 --inner eager

Every number of layers runs in a process of its own, without Inductor's caches. The last line is the ratio of all that
is not Dynamo's, between the most and the fewest layers; alike layers are compiled once, so that it should be near 1.
"""

import argparse
import importlib
import json
import multiprocessing
import platform
import time
from datetime import date
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bdlora_compile as bd


def measure(layers: int, inner: str) -> dict[str, Any]:
    """Seconds of the first forward of a model of ``layers``, by part."""
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
    model.compile(backend="bdlora", options={"inner": inner})
    ids = torch.randint(3, 250, (2, 16))
    start = time.perf_counter()
    with torch.no_grad():
        model(ids)
    total = time.perf_counter() - start
    (report,) = bd.reports(model)
    return {
        "layers": layers,
        "dynamo_s": round(total - report.pass_seconds - report.emit_seconds, 2),
        "passes_s": round(report.pass_seconds, 2),
        "emit_s": round(report.emit_seconds, 2),
    }


def main() -> None:
    """Measure every number of layers and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 80], help="numbers of layers to compile")
    parser.add_argument("--inner", choices=["eager", "inductor"], default="inductor", help="what compiles the regions")
    arguments = parser.parse_args()
    print(f"{date.today()}, {platform.processor() or platform.machine()}, torch {torch.__version__}, {arguments.inner}")
    print(f"{'layers':>7} {'Dynamo s':>9} {'passes s':>9} {'emit s':>9} {'all but Dynamo':>15}")
    rows = []
    for layers in arguments.layers:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure, (layers, arguments.inner))
        rest = row["passes_s"] + row["emit_s"]
        rows.append((layers, rest))
        print(
            f"{layers:>7} {row['dynamo_s']:>9.2f} {row['passes_s']:>9.2f} {row['emit_s']:>9.2f} {rest:>15.2f}",
            flush=True,
        )
        print(json.dumps(row), flush=True)
    (fewest, least), (most, largest) = min(rows), max(rows)
    print(f"{most} layers cost {largest / least:.2f} times {fewest} layers, without Dynamo's tracing")


if __name__ == "__main__":
    main()
