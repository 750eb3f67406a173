"""`bdlora serve` as users start it, in processes of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.serving.http.fake import ADMIN

REPOSITORY = Path(__file__).parents[3]


@contextmanager
def started(arguments: Sequence[str | Path], log: Path) -> Iterator[subprocess.Popen[str]]:
    """``bdlora serve`` on a free port, with the admin token of tests. Nothing of it is left after the block.

    Args:
        arguments: after ``serve``.
        log: where its output goes; `address` reads it.
    """
    command = [sys.executable, "-m", "bdlora_compile", "serve", *map(str, arguments), "--port", "0"]
    environment = os.environ | {"BDLORA_ADMIN_TOKEN": ADMIN, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, text=True, env=environment, cwd=REPOSITORY)
    try:
        yield process
    finally:
        ranks = ranks_of(process)
        process.terminate()
        try:
            process.wait(60)
        finally:
            for rank in ranks:
                if rank.is_running():
                    rank.kill()
            process.kill()


def address(process: subprocess.Popen[str], log: Path, seconds: float) -> str:
    """The server's URL, once it serves."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("serving"):
                return line.rpartition(" ")[2]
        time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-4000:]}")


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of the ranks, rank 0 first; none if all have ended."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        ranks = [child for child in children if "bdlora_compile.serving.http.server" in child.cmdline()]
        return sorted(ranks, key=lambda rank: int(rank.environ()["RANK"]))
    except psutil.Error:
        return []
