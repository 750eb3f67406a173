"""What reading an adapter costs: from a file that the page cache holds to factors in host memory, checked and hashed.

    python benchmarks/bench_adapter_read.py                      Llama-3.1-8B's shapes, rank 32, on rank 0 of 2 and of 8
    python benchmarks/bench_adapter_read.py --device cuda        into pinned memory

A load is all that `AdapterSet.load` does on one rank for a new name but the exchange with the others. "again" is what a
cold adapter costs of which host memory has no copy any more.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from bdlora_compile.deploying import served_sites
from bdlora_compile.factors import Layout
from bdlora_compile.placement import Mesh
from bdlora_compile.plan import ModelPlan, plan_model
from bdlora_compile.runtime.adapter_version import Version
from bdlora_compile.runtime.agreement import Alone
from bdlora_compile.runtime.all_reduce import AllReduce
from bdlora_compile.runtime.bank import AdapterBank
from bdlora_compile.runtime.copier import copier_for
from bdlora_compile.runtime.deployment import Deployment, RankState
from bdlora_compile.runtime.staging import Stager
from bdlora_compile.runtime.store import MemorySource, ShardStore
from bdlora_compile.sites import Role, Site

BLOCKS = 8


def plan_of(options: argparse.Namespace, ranks: int) -> ModelPlan:
    """Of a model that has no weights."""
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 7 // 2,
        num_attention_heads=options.hidden // 128,
        num_key_value_heads=8,
        num_hidden_layers=options.layers,
        vocab_size=128,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    mesh = Mesh(ranks)
    sites = served_sites(model, mesh, strict=True)
    layouts = dict.fromkeys(sites, Layout.LOCAL)
    return plan_model(model, sites, mesh, layouts, options.rank, torch.bfloat16, torch.device(options.device))


def stager_of(plan: ModelPlan) -> Stager:
    """Rank 0, with a bank that holds nothing: reading does not touch it."""
    bank = AdapterBank(list(plan.sites), 1, 1, 1, plan.dtype, plan.device, copier_for(plan.device))
    store = ShardStore(MemorySource({}), 0, plan.mesh, plan.dtype, plan.device)
    return Stager(Deployment(plan, [RankState(0, store, bank, AllReduce("none"))], Alone()), None)


def write(folder: Path, sites: dict[str, Site], rank: int, blocks: int, dtype: torch.dtype) -> None:
    """An adapter on all sites; with ``blocks`` above 1 a block-diagonal one."""
    tensors = {}
    for name, site in sites.items():
        is_column = site.role is Role.COLUMN
        shape_a = (rank, site.in_features // (1 if is_column else blocks))
        shape_b = (site.out_features, rank // (blocks if is_column else 1))
        for factor, shape in (("A", shape_a), ("B", shape_b)):
            tensors[f"base_model.model.{name}.lora_{factor}.weight"] = torch.randn(shape).to(dtype)
    names = {role: sorted({name.rpartition(".")[2] for name in sites if sites[name].role is role}) for role in Role}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [*names[Role.COLUMN], *names[Role.ROW]],
    }
    if blocks > 1:
        lists = {"target_modules_bd_a": names[Role.ROW], "target_modules_bd_b": names[Role.COLUMN]}
        config["use_bdlora"] = {**lists, "nblocks": blocks, "match_strict": True}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def milliseconds(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Best and median."""
    times = []
    work()
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times), statistics.median(times)


def main() -> None:
    """A line for each kind of file and number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(f"{date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads of torch, {options.device}")
    with tempfile.TemporaryDirectory() as folder:
        for blocks, dtype in ((BLOCKS, torch.bfloat16), (BLOCKS, torch.float32), (1, torch.bfloat16)):
            path = Path(folder) / f"{blocks}-{dtype}"
            write(path, dict(plan_of(options, 1).sites), options.rank, blocks, dtype)
            size = (path / "adapter_model.safetensors").stat().st_size
            for ranks in (2, 8):
                stager = stager_of(plan_of(options, ranks))
                content = stager.stage(path)
                version = Version(
                    "x", content.digest, content.rank, content.elements, (), content.source, content.fingerprints, None
                )
                best, median = milliseconds(lambda stager=stager, path=path: stager.stage(path), options.repeats)
                again, _ = milliseconds(
                    lambda stager=stager, version=version: stager.stage_again(version), options.repeats
                )
                print(
                    f"{blocks} blocks, {dtype}, {size / 1e6:.0f} MB, rank 0 of {ranks}: load {best:.0f} ms "
                    f"(median {median:.0f}), {size / best / 1e6:.2f} GB/s; again {again:.0f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    main()
