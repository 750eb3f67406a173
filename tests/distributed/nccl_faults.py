"""A rank on a GPU dies or hangs while rows decode from CUDA graphs, at idle, and while adapters are loaded.

    python -m tests.distributed.nccl_faults FOLDER               on two GPUs
    python -m tests.distributed.nccl_faults FOLDER --ranks 8     on eight
    python -m tests.distributed.nccl_faults FOLDER --gloo        to see it run on a CPU

All cases run at the same time. Every other rank must end by itself, in time, and say which rank is lost. NCCL's own
limit is longer than that: torch's watchdog is not what ends them. The store is held as with torchrun, by the process
that starts the ranks, or by rank 0.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

import bdlora_compile as bd
from bdlora_compile.backend import bdlora
from tests.distributed.launch import free_port
from tests.models import AdapterSpec, ModelSpec, save_adapter, save_model

NOTES = timedelta(seconds=16)
"""How long ranks wait for one another; a forward may take 5 s less. All cases share the GPUs: steps are slow."""
COLLECTIVES = {"nccl": timedelta(seconds=300), "gloo": timedelta(seconds=10)}
ALLOWED = 30.0
"""Seconds from the signal to the end of the other ranks."""


@dataclass(frozen=True)
class Fault:
    """What all ranks do, and what happens to one of them.

    Attributes:
        name: of the case.
        act: what a rank does; it says when it is ready.
        victim: the rank that gets the signal.
        sign: SIGKILL (it died) or SIGSTOP (it hangs).
        said: what the other ranks' errors hold.
        all_reduce: as for `bdlora_compile.load`.
        is_store_at_rank_0: whether rank 0 holds the store.
    """

    name: str
    act: Callable[[Any, bd.AdapterSet, Path], object]
    victim: int
    sign: signal.Signals
    said: str
    all_reduce: Any = "auto"
    is_store_at_rank_0: bool = False


def ready() -> None:
    print("ready", flush=True)


def decode(model: Any, adapters: bd.AdapterSet, folder: Path) -> None:
    """One token after the other; each is waited for, as whoever samples it does."""
    model.compile(backend=bdlora, options={"inner": "eager"})
    cache = bd.make_cache(model, 1, 8192)
    token = torch.tensor([[5]], device=model.bdlora.plan.device)
    with adapters.use("first"), torch.no_grad():
        for step in range(8000):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            token.item()
            if step == 8:
                replayed = sum(report.step_graphs.replayed for report in bd.reports(model) if report.step_graphs)
                assert token.device.type == "cpu" or replayed > 2, [one.summary() for one in bd.reports(model)]
                ready()
            time.sleep(0.005)


def load_later(model: Any, adapters: bd.AdapterSet, folder: Path) -> None:
    ready()
    time.sleep(1.5)
    adapters.load("second", folder / "second")


def load_often(model: Any, adapters: bd.AdapterSet, folder: Path) -> None:
    for number in range(10**6):
        adapters.load("second", folder / "second")
        adapters.unload("second")
        if number == 2:
            ready()


CASES = [
    Fault("killed while rows decode", decode, 1, signal.SIGKILL, "rank 1"),
    Fault("stopped while rows decode", decode, 1, signal.SIGSTOP, "rank 1"),
    Fault("killed while rows decode, sums by NCCL", decode, 1, signal.SIGKILL, "rank 1", "nccl"),
    Fault("stopped while rows decode, sums by NCCL", decode, 1, signal.SIGSTOP, "rank 1", "nccl"),
    Fault("holder of the store killed while rows decode", decode, 0, signal.SIGKILL, "store", is_store_at_rank_0=True),
    Fault("killed, rank 0 holds the store", decode, 1, signal.SIGKILL, "rank 1", is_store_at_rank_0=True),
    Fault("killed at idle", load_later, 1, signal.SIGKILL, "rank 1"),
    Fault("stopped while adapters are loaded", load_often, 1, signal.SIGSTOP, "rank 1"),
]


@dataclass(frozen=True)
class Group:
    """Where ranks meet.

    Attributes:
        size: ranks.
        port: of the store.
        backend: "nccl" or "gloo".
    """

    size: int
    port: int
    backend: str


def run_rank(fault: Fault, rank: int, group: Group, folder: Path) -> int:
    """The life of one rank; it ends by an error."""
    backend, size = group.backend, group.size
    try:
        torch.set_num_threads(1)
        if backend == "nccl":
            torch.cuda.set_device(rank)
            os.environ["LOCAL_RANK"] = str(rank)
        holds = rank == 0 and fault.is_store_at_rank_0
        store = TCPStore("127.0.0.1", group.port, size, is_master=holds, timeout=timedelta(seconds=60))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVES[backend])
        ranks = bd.Ranks.of_process_group(timeout=NOTES)
        dtype = torch.bfloat16 if backend == "nccl" else torch.float32
        paths = {"first": folder / "first"}
        model, adapters = bd.load(folder / "model", paths, dtype=dtype, all_reduce=fault.all_reduce, ranks=ranks)
        fault.act(model, adapters, folder)
        print("ended without an error", flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    # Nothing is cleaned up: that would wait for the other ranks.
    os._exit(1)


def run_case(fault: Fault, folder: Path, size: int, backend: str) -> str:
    """Start all ranks, send the signal when all are ready, and wait for the end of the others."""
    port = free_port()
    if not fault.is_store_at_rank_0:
        # As long as the ranks run.
        store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        port = store.port
    where = [sys.executable, "-m", "tests.distributed.nccl_faults", str(folder), "--backend", backend]
    where += ["--ranks", str(size), "--port", str(port)]
    command = [*where, "--case", str(CASES.index(fault)), "--rank"]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(size)
    ]
    try:
        for process in ranks:
            _wait_until_ready(fault, process)
        at = time.monotonic()
        ranks[fault.victim].send_signal(fault.sign)
        said = [fault.said]
        if backend == "gloo" and size > 2 and fault.is_store_at_rank_0:
            # Ranks that exchange nothing with the lost one wait until the others end, and rank 0's store with them.
            said.append("holds the store")
        others = [rank for rank in range(size) if rank != fault.victim]
        texts = [_last_words(f"{fault.name}, rank {rank}", said, ranks[rank], at) for rank in others]
        seconds = time.monotonic() - at
        return f"{fault.name}: {len(texts)} others ended within {seconds:.1f} s: {texts[-1][:160]}"
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _last_words(name: str, said: Sequence[str], process: "subprocess.Popen[str]", at: float) -> str:
    """The error by which a rank ends, once it has; the signal was sent at ``at``."""
    try:
        output, _ = process.communicate(timeout=max(ALLOWED - (time.monotonic() - at), 0.1))
    except subprocess.TimeoutExpired as hangs:
        raise AssertionError(f"{name}: it still runs after {ALLOWED:g} s") from hangs
    assert process.returncode != 0, f"{name}: {output[-2000:]}"
    assert "AgreementError: " in output, f"{name}: {output[-2000:]}"
    text = output[output.index("AgreementError: ") :].splitlines()[0]
    assert any(part in text for part in said), f"{name}: {text}"
    return text


def _wait_until_ready(fault: Fault, process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        if line == "ready\n":
            return
        said.append(line)
    raise AssertionError(f"{fault.name}: a rank did not get ready: {''.join(said)[-3000:]}")


def main(arguments: Sequence[str]) -> int:
    """Run all cases; a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gloo", dest="backend", action="store_const", const="gloo", default="nccl")
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4, 8))
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank is not None:
        group = Group(options.ranks, options.port, options.backend)
        return run_rank(CASES[options.case], options.rank, group, options.folder)
    folder = options.folder
    model = save_model(ModelSpec(heads=8, kv_heads=2, head_dim=16, layers=2, intermediate=96), folder / "model")
    for seed, name in enumerate(("first", "second")):
        save_adapter(AdapterSpec(rank=4, nblocks=2), model, folder / name, seed)
    failed = 0
    with ThreadPoolExecutor(len(CASES)) as pool:
        for case in [pool.submit(run_case, fault, folder, options.ranks, options.backend) for fault in CASES]:
            try:
                print(f"case: {case.result()}", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"FAILED {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
