"""A rank dies or hangs, at idle, while adapters are loaded and while rows decode: all others end with an error in time.

    python -m tests.distributed.adapter_faults FOLDER

Everything is imported once, then each case forks three ranks over gloo: starting processes would cost most of the time.
While the ranks of one case wait for their time limits, those of the next one load.
"""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

import bdlora_compile as bd
from bdlora_compile.runtime import staging
from bdlora_compile.runtime.adapter_version import content_digest
from tests.distributed.launch import free_port
from tests.models import AdapterSpec, ModelSpec, save_adapter, save_model

SIZE = 3
NOTES = timedelta(seconds=10)
"""How long ranks wait for one another when they compare notes."""
COLLECTIVES = timedelta(seconds=10)
"""How long a collective waits."""
ALLOWED = 30.0
"""Seconds from the signal to the end of the last other rank."""
IDS = torch.tensor([[5, 9, 33, 71]])


@dataclass(frozen=True)
class Fault:
    """What a rank does, and what happens to one of them.

    Attributes:
        name: of the case.
        act: what every rank does, after it has said that it is ready.
        victim: the rank that gets the signal; 0 holds the store.
        sign: SIGKILL (it died) or SIGSTOP (it hangs).
        said: what every other rank's error holds.
        delay: seconds from the moment that all are ready to the signal.
    """

    name: str
    act: Callable[["Rank"], object]
    victim: int
    sign: signal.Signals
    said: str
    delay: float = 0.0


@dataclass
class Rank:
    """One rank's process, after it has loaded the model."""

    rank: int
    model: Any
    adapters: bd.AdapterSet
    folder: Path
    out: int

    def ready(self) -> None:
        os.write(self.out, b"ready\n")


def load_later(own: Rank) -> None:
    """Idle for a while, then load: the signal comes in between."""
    own.ready()
    time.sleep(1.5)
    own.adapters.load("second", own.folder / "second")


def load_slowly(own: Rank) -> None:
    """The signal comes while the victim reads the adapter; the others have read it and wait."""
    read = content_digest

    def slow(adapter: Any) -> str:
        own.ready()
        if own.rank == 1:
            time.sleep(3600)
        return read(adapter)

    staging.content_digest = slow  # type: ignore[attr-defined]  # the name that `staging` calls
    own.adapters.load("second", own.folder / "second")


def decode_forever(own: Rank) -> None:
    own.model.compile(backend="bdlora")
    with own.adapters.use("first"), torch.no_grad():
        own.model(IDS)
        own.ready()
        while True:
            own.model(IDS)


CASES = [
    Fault("killed at idle", load_later, 2, signal.SIGKILL, "rank 2, at exchange"),
    Fault("stopped at idle", load_later, 1, signal.SIGSTOP, "rank 1, at exchange"),
    Fault("holder of the store killed at idle", load_later, 0, signal.SIGKILL, "store of the process group"),
    Fault("holder of the store stopped at idle", load_later, 0, signal.SIGSTOP, "at exchange"),
    Fault("killed while it loads", load_slowly, 1, signal.SIGKILL, "rank 1, at exchange", 0.5),
    Fault("stopped while it loads", load_slowly, 1, signal.SIGSTOP, "rank 1, at exchange", 0.5),
    Fault("killed while rows decode", decode_forever, 1, signal.SIGKILL, "heard of rank 1", 0.3),
    Fault("holder of the store killed while rows decode", decode_forever, 0, signal.SIGKILL, "the store", 0.3),
    Fault("stopped while rows decode", decode_forever, 1, signal.SIGSTOP, "heard of rank 1", 0.3),
]


def run_rank(fault: Fault, rank: int, port: int, folder: Path, out: int) -> NoReturn:
    """The life of one rank; it ends by an error, which it writes to ``out``."""
    try:
        store = TCPStore("127.0.0.1", port, SIZE, is_master=rank == 0, timeout=timedelta(seconds=60))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=COLLECTIVES)
        ranks = bd.Ranks.of_process_group(timeout=NOTES)
        model, adapters = bd.load(folder / "model", {"first": folder / "first"}, ranks=ranks)
        own = Rank(rank, model, adapters, folder, out)
        fault.act(own)
        said = {"error": "", "text": "ended without an error"}
    except Exception as error:
        said = {"error": type(error).__name__, "text": str(error)}
    os.write(out, (json.dumps({**said, "at": time.monotonic()}) + "\n").encode())
    # The holder of the store stays until the others have said theirs, as a launcher's store does.
    signal.pause()
    os._exit(0)


@dataclass(frozen=True)
class Started:
    """A case whose victim has its signal.

    Attributes:
        fault: what happened.
        ranks: process and pipe of each.
        at: when the signal was sent, on the clock that all processes share.
    """

    fault: Fault
    ranks: list[tuple[int, int]]
    at: float

    def line(self) -> str:
        """Wait for what the other ranks say, and check it."""
        fault = self.fault
        others = [out for rank, (_, out) in enumerate(self.ranks) if rank != fault.victim]
        # They may have said it while later cases started: the time that counts is theirs.
        errors = [json.loads(_line(out, max(ALLOWED - (time.monotonic() - self.at), 1.0))) for out in others]
        seconds = max(error["at"] for error in errors) - self.at
        assert seconds < ALLOWED, f"{fault.name}: others ended after {seconds:.1f} s"
        for error in errors:
            assert error["error"], f"{fault.name}: {error}"
            assert fault.said in error["text"], f"{fault.name}: {error}"
            assert error["error"] == "AgreementError", f"{fault.name}: {error}"
        return f"{fault.name}: others ended after {seconds:.1f} s: {errors[0]['text'][:90]!r}"

    def end(self) -> None:
        """Kill all ranks."""
        for process, out in self.ranks:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            os.close(out)


def start_case(fault: Fault, folder: Path) -> Started:
    """Fork the ranks, wait until all are ready, send the signal."""
    port = free_port()
    ranks = [_fork(fault, rank, port, folder) for rank in range(SIZE)]
    try:
        for _, out in ranks:
            assert (said := _line(out, 240.0)) == "ready", f"{fault.name}: a rank did not get ready: {said}"
    except BaseException:
        Started(fault, ranks, 0.0).end()
        raise
    time.sleep(fault.delay)
    at = time.monotonic()
    os.kill(ranks[fault.victim][0], fault.sign)
    return Started(fault, ranks, at)


def _fork(fault: Fault, rank: int, port: int, folder: Path) -> tuple[int, int]:
    out, into = os.pipe()
    process = os.fork()
    if process == 0:
        run_rank(fault, rank, port, folder, into)
    os.close(into)
    return process, out


def _line(out: int, seconds: float) -> str:
    """The next line of a pipe within a time limit; "" if there is none."""
    text, deadline = b"", time.monotonic() + seconds
    while not text.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([out], [], [], left)[0]:
            raise AssertionError(f"nothing within {seconds:.0f} s")
        part = os.read(out, 1)
        if not part:
            raise AssertionError("the process ended without a word")
        text += part
    return text.decode().strip()


def main(arguments: Sequence[str]) -> int:
    """Run the cases; a line each."""
    torch.set_num_threads(1)
    folder = Path(arguments[0])
    model = save_model(ModelSpec(heads=6, kv_heads=3, layers=1, intermediate=48), folder / "model")
    for seed, name in enumerate(("first", "second")):
        save_adapter(AdapterSpec(rank=3, nblocks=3), model, folder / name, seed)
    running: list[Started] = []
    try:
        for fault in CASES:
            running.append(start_case(fault, folder))
        for case in running:
            print(f"case: {case.line()}", flush=True)
    finally:
        for case in running:
            case.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
