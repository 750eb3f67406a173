"""What LoRA costs in a tensor-parallel decode step: block-diagonal, S-LoRA's collectives, replicated, and none.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.bench_decode --out results.jsonl
    python -m benchmarks.bench_decode --fake-tp 8                rank 0 of 8 alone: compute without the collectives
    torchrun --standalone --nproc-per-node 8 -m benchmarks.bench_decode --model llama-3.1-70b --weights device
    python -m benchmarks.bench_decode --tiny                     only to see it run, on a CPU

Random weights in the shapes of Llama-3.1-8B (or a checkpoint: --model FOLDER), bf16. Every column's logits are compared
with float32 of transformers and PEFT first. "step" is a user's loop that reads each token, guards and host included;
"gpu" the same steps launched without waiting; "floor" the bytes that a rank has to read, at memory's measured speed.
All columns are timed before any is profiled, for what its steps are made of.
"""

import argparse
import gc
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import date, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig

from bdlora_compile.machine import find_machine
from bdlora_compile.strategy import Strategy
from benchmarks.decode.columns import Case, Column
from benchmarks.decode.files import (
    ATTENTION_SITES,
    CONTENTS,
    AdapterKind,
    model_config,
    roomy_folder,
    write_adapters,
    write_model,
    write_sparse_model,
)
from benchmarks.decode.loops import OurLoop, TransformersLoop
from benchmarks.decode.pricing import priced
from benchmarks.decode.reference import COPIES, NO_ADAPTER, ROWS, STEPS, Expected, prompts, references
from benchmarks.decode.timing import PARTS, Times, measure, prefill_times, profile_steps

KINDS = {
    "bd32": AdapterKind(32, 8),
    "bd24": AdapterKind(24, 2),
    "bd64": AdapterKind(64, 8),
    "bd32attn": AdapterKind(32, 8, only_attention=True),
    "plain16": AdapterKind(16),
    "plain16attn": AdapterKind(16, only_attention=True),
}
"""The paper's pairs with an ordinary r=16: r=32 in 8 blocks has 0.86 of its parameters on an 8B model, r=64 1.73."""

USUAL = [kind for kind in KINDS if kind != "bd64"]

LOADS: dict[Strategy, Sequence[str]] = {
    "local": ("bd32", "bd24", "bd64", "plain16", "bd32attn", "plain16attn"),
    "slora": ("plain16", "plain16attn"),
}
"""What each strategy is measured with; "local" with ordinary adapters holds one factor whole on every rank."""


class Bench:
    """One process's part of the benchmark; rank 0 prints and writes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if not _has_gpu():
            self.device = torch.device("cpu")
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.is_fake = dist.is_initialized() and dist.get_backend() == "fake"
        self.dtype = torch.bfloat16 if _has_gpu() else torch.float32
        self.machine = find_machine(options.machine, self.device)
        self.base_step: dict[int, float] = {}
        self.timed: list[tuple[Column, Case, Times]] = []
        self.failures: list[str] = []

    @property
    def prompts(self) -> torch.Tensor:
        """Those whose logits are compared."""
        return prompts().to(self.device)

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def write(self, kind: str, **fields: Any) -> None:
        """Append a line to the results, at once: a run that is cut off keeps what it found."""
        if self.rank == 0 and self.options.out is not None:
            with Path(self.options.out).open("a") as file:
                file.write(json.dumps({"kind": kind, **fields}) + "\n")

    def took(self, strategy: str, what: str, seconds: float) -> None:
        """Say and keep what preparing took: whoever plans a run of many columns wants to know."""
        self.say(f"{strategy}: {what} {seconds:.1f} s")
        self.write("seconds", strategy=strategy, what=what, seconds=round(seconds, 1))

    # --- files ------------------------------------------------------------------------------------------------------

    def prepare(self, folder: Path, config: PretrainedConfig) -> Path:
        """Write what is missing on rank 0; returns the model's folder."""
        own = Path(self.options.model)
        model = own if own.is_dir() and not self.makes_weights else folder / "model"
        if self.rank == 0:
            start = time.perf_counter()
            if self.makes_weights:
                write_sparse_model(config, model)
            elif not own.is_dir():
                model.mkdir()
                write_model(config, model, self.dtype, self.device)
            wanted = {kind: KINDS[kind] for kind in self.kinds()}
            write_adapters(wanted, config, folder / "adapters", self.dtype, self.device)
            self.took("all", "files", time.perf_counter() - start)
        self.wait()
        return model

    def new_folder(self) -> Path:
        """For the checkpoint and the adapters: in memory where they fit, where holes of files would take room."""
        if self.makes_weights:
            return Path(tempfile.mkdtemp(prefix="bench-decode-"))
        return roomy_folder(60 << 30 if _has_gpu() else 1 << 20)

    @property
    def makes_weights(self) -> bool:
        """Whether each rank makes its weights: what is loaded is a hole of the file system, which reads as zeros."""
        return bool(self.options.weights == "device")

    @property
    def compares(self) -> bool:
        """Whether logits are compared, on rank 0; all ranks run the forwards."""
        return not (self.is_fake or self.options.no_check or self.makes_weights)

    def kinds(self) -> Sequence[str]:
        """Kinds of adapters that some column needs."""
        wanted = {kind for strategy in self.options.strategy for kind in self.columns(strategy)}
        return [kind for kind in KINDS if kind in wanted]

    def columns(self, strategy: Strategy) -> Sequence[str]:
        """Kinds of adapters that a strategy is measured with."""
        return [kind for kind in LOADS[strategy] if kind in self.options.kinds]

    def wait(self) -> None:
        """All ranks are here."""
        if self.size > 1 and not self.is_fake:
            dist.barrier()

    def expected(self, model: Path, folder: Path) -> dict[str, Expected]:
        """References, on rank 0 alone; one rank of a fake group has no right logits to compare."""
        if not self.compares:
            return {}
        found = {}
        if self.rank == 0:
            start = time.perf_counter()
            found = dict(references(model, folder / "adapters", self.kinds(), self.dtype, self.device))
            self.took("all", "references", time.perf_counter() - start)
        free()
        self.wait()
        return found

    # --- columns ----------------------------------------------------------------------------------------------------

    def run(self, folder: Path, config: PretrainedConfig) -> None:
        """All columns; their recorded graphs are let go of in any case: nothing ends before they are gone."""
        try:
            self.run_columns(folder, config)
        finally:
            for loop in {id(column.loop): column.loop for column, _, _ in self.timed}.values():
                loop.release()

    def run_columns(self, folder: Path, config: PretrainedConfig) -> None:
        """Time all, then profile them."""
        model = self.prepare(folder, config)
        expected = self.expected(model, folder)
        for strategy, kinds in self.loads():
            self.run_ours(model, folder / "adapters", strategy, kinds, expected)
            free()
        if self.options.baseline and not self.is_fake and not self.makes_weights:
            self.run_baseline(model)
        if self.device.type == "cuda":
            self.profile()

    def loads(self) -> Iterator[tuple[Strategy, Sequence[str]]]:
        """What is measured with one load of the model each: adapters of attention alone pay for no other layers."""
        for strategy in self.options.strategy:
            for only_attention in (False, True):
                kinds = [kind for kind in self.columns(strategy) if KINDS[kind].only_attention is only_attention]
                if kinds:
                    yield strategy, kinds

    def run_ours(
        self,
        model: Path,
        adapters: Path,
        strategy: Strategy,
        names_of_kinds: Sequence[str],
        expected: dict[str, Expected],
    ) -> None:
        """Columns of one strategy, all from one load of the model."""
        slots = max(CONTENTS, *(case.adapters for case in self.cases()))
        kinds = [KINDS[kind] for kind in names_of_kinds]
        capacity = {
            "max_adapters": slots,
            "max_rank": max(kind.rank for kind in kinds),
            "max_local_rank": max(kind.local_rank(self.size) for kind in kinds),
            "target_modules": ATTENTION_SITES if kinds[0].only_attention else None,
        }
        start = time.perf_counter()
        loop = OurLoop(model, strategy, self.machine, self.dtype, self.device, self.options.inner, capacity)
        self.took(strategy, "load of the model", time.perf_counter() - start)
        for kind in names_of_kinds:
            files = {f"{kind}-{i}": adapters / f"{kind}-{i % CONTENTS}" for i in range(slots)}
            names = [*files]
            column = Column(strategy, KINDS[kind].text, loop, files)
            self.took(strategy, f"load of {len(names)} adapters, {column.adapters}", column.load())
            column = replace(column, adapter_bytes=loop.adapters[names[0]].nbytes)
            start = time.perf_counter()
            chosen = [None if i is None else names[i] for i in ROWS]
            logits = loop.logits(self.prompts, chosen, STEPS)
            self.took(strategy, f"first forwards, {column.adapters}", time.perf_counter() - start)
            if self.makes_weights:
                loop.fill_weights()
            self.check(strategy, column.adapters, expected.get(kind), logits)
            if self.compares:
                logits = loop.logits(self.prompts.repeat(COPIES, 1), COPIES * chosen, STEPS)
                self.check(strategy, column.adapters, expected.get(kind), logits)
            if not self.base_step:
                if self.compares:
                    without = loop.logits(self.prompts, [None] * len(ROWS), STEPS)
                    self.check("base", "none", expected.get(NO_ADAPTER), without)
                for case in self.cases(only_base=True):
                    self.row(Column("base", "none", loop), case)
            for case in self.cases():
                self.row(column, case)
            if self.options.prefill:
                with loop.chosen([names[0], names[1]]):
                    times = prefill_times(loop, 2, self.options.prefill // 2)
                self.say(f"  prefill of {self.options.prefill} tokens in two rows: {times.step:.2f} ms")
                self.write("prefill", **column.names, **asdict(times))
        self.write("report", strategy=strategy, text=loop.report_text())

    def check(self, strategy: str, adapters: str, expected: Expected | None, logits: torch.Tensor) -> None:
        """Compare a column's logits where there are some to compare them with, print a line, keep it.

        What is off is told at the end: the other ranks do not know of it, and what was measured is kept.
        """
        if expected is None:
            return
        found, rows = expected.check(logits), logits.shape[0]
        self.say(f"  {strategy}, {adapters}, {rows} rows: {found.text}")
        self.write("check", strategy=strategy, kind_of_adapters=adapters, rows=rows, **asdict(found))
        try:
            found.verify()
        except AssertionError as error:
            self.failures.append(f"{strategy}, {adapters}, {rows} rows: {error}")

    def run_baseline(self, model: Path) -> None:
        """transformers' tensor parallelism with ``mode="reduce-overhead"``."""
        try:
            loop = TransformersLoop(model, self.dtype, self.device)
            for case in self.cases(only_base=True):
                self.row(Column("transformers", "none", loop), case)
        except Exception as error:  # another project's code: its failure is a result, not ours to raise
            self.say(f"transformers' tensor parallelism failed: {str(error)[:300]}")
            self.write("failed", column="transformers", error=str(error)[:2000])

    def cases(self, *, only_base: bool = False) -> Iterator[Case]:
        """Batches of a column."""
        for batch in self.options.batch:
            for adapters in [1] if only_base else self.options.adapters:
                if adapters <= batch:
                    yield Case(batch, adapters, self.options.context)

    def row(self, column: Column, case: Case) -> None:
        """Time a batch, print a line, keep it."""
        loop, floor, estimate = column.loop, None, 0.0
        with column.chosen(case):
            times = measure(loop, case.batch, case.context)
        if isinstance(loop, OurLoop):
            num_bytes = loop.weight_bytes() + loop.cache_bytes() + column.adapter_bytes * case.adapters
            floor = num_bytes / self.machine.memory_bandwidth * 1e3
            with_lora = column.strategy != "base"
            per_layer = loop.collectives(case.batch, with_lora=with_lora)
            if self.is_fake:
                estimate = priced(loop.census(case.batch, with_lora=with_lora), case.batch, self.machine)
        else:
            per_layer = (2, 0)
        if column.strategy == "base":
            self.base_step[case.batch] = times.step
        self.timed.append((column, case, times))
        ratio = times.step / self.base_step[case.batch] if case.batch in self.base_step else float("nan")
        above = f"{times.gpu / floor:5.2f}" if floor else "     "
        extra = f" +{estimate:.2f} of collectives, an estimate" if estimate else ""
        shown = f"{times.step:7.3f} {ratio:6.3f} {times.gpu:7.3f} {times.host:6.3f} {above}{extra}"
        self.say(f"{column.line(case)}  {shown}")
        shape = {"tp": self.size, "fake": self.is_fake, "collectives_per_layer": per_layer, "priced_ms": estimate}
        self.write("row", **column.names, **asdict(case), **asdict(times), floor=floor, **shape)

    def profile(self) -> None:
        """What the steps of all rows are made of; print a line for each, keep it."""
        self.say(f"{'strategy':<12} {'adapters':<24} row  ad  {' '.join(f'{part:>11}' for part in PARTS)}")
        for column, rows in groupby(self.timed, key=lambda row: row[0]):
            column.load()
            for _, case, times in rows:
                with column.chosen(case):
                    found = profile_steps(column.loop, case.batch, case.context, times.gpu)
                parts = " ".join(f"{found.parts[part]:11.2f}" for part in PARTS)
                self.say(f"{column.line(case)}  {parts}")
                self.write("parts", **column.names, **asdict(case), **asdict(found))


def free() -> None:
    """Give memory back before the next model."""
    torch._dynamo.reset()
    gc.collect()
    if _has_gpu():
        torch.cuda.empty_cache()


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def start_group(fake: int) -> None:
    """The process group of torchrun, or one rank's of a fake one."""
    if fake:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=fake)
        return
    if "WORLD_SIZE" not in os.environ:
        return
    if _has_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if _has_gpu() else "gloo", timeout=timedelta(seconds=300))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", help="a known configuration, or a folder with weights")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 1], help="rows")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 16, 64], help="distinct adapters")
    parser.add_argument("--context", type=int, default=512, help="tokens that each row holds")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the prefill; 0 leaves it out")
    parser.add_argument("--strategy", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=USUAL, help="kinds of adapters")
    parser.add_argument(
        "--weights",
        choices=["files", "device"],
        default="files",
        help="device: each rank makes its own, nothing large is written; without logits to compare, and transformers",
    )
    parser.add_argument("--inner", choices=["eager", "inductor"], default="inductor")
    parser.add_argument("--machine", help="a known one, or a file of `bdlora calibrate`: how all-reduces go, prices")
    parser.add_argument("--fake-tp", type=int, default=0, help="be rank 0 of so many, on one GPU")
    parser.add_argument("--no-check", action="store_true", help="do not compare logits")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false", help="leave transformers' own out")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers")
    parser.add_argument("--out", help="results, a JSON line each")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    options = parse()
    start_group(options.fake_tp)
    bench = Bench(options)
    config = model_config(options.model, options.layers)
    if options.tiny:
        config.update({"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1024})
        config.update({"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32, "initializer_range": 0.1})
    shared = [bench.new_folder() if bench.rank == 0 else Path()]
    if bench.size > 1 and not bench.is_fake:
        dist.broadcast_object_list(shared, src=0)
    name = torch.cuda.get_device_name() if _has_gpu() else platform.processor() or "CPU"
    bench.say(f"{date.today()} {name}, torch {torch.__version__}, {bench.size} ranks{' (fake)' * bench.is_fake}")
    told = {name: value for name, value in vars(options).items() if name != "out"}
    bench.write("run", date=str(date.today()), device=name, torch=torch.__version__, tp=bench.size, options=told)
    bench.say(f"{'strategy':<12} {'adapters':<24} row  ad     step  ratio     gpu   host floor")
    try:
        with torch.no_grad():
            bench.run(shared[0], config)
        bench.wait()
    finally:
        if bench.rank == 0:
            shutil.rmtree(shared[0], ignore_errors=True)
        if dist.is_initialized():
            dist.destroy_process_group()
    if bench.failures:
        raise SystemExit("\n".join(bench.failures))


if __name__ == "__main__":
    main()
