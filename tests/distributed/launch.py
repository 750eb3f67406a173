"""Run a module's ``main`` on many ranks: everything is imported once, then the ranks are forked.

    python -m tests.distributed.launch 4 tests.distributed.collective_bytes FOLDER

A rank finds the environment that torchrun gives. Starting a process for each rank would import everything anew, which
costs more than most cases do.
"""

import importlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn


def command(size: int, module: str, *arguments: object) -> list[str]:
    """The command line of a launch."""
    return [sys.executable, "-m", "tests.distributed.launch", str(size), module, *map(str, arguments)]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(rank: int, size: int, port: int, module: str) -> NoReturn:
    """The life of one rank."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    status = 1
    try:
        status = importlib.import_module(module).main()
    except BaseException:
        print(f"rank {rank}:", file=sys.stderr)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Nothing of the parent, whose copy this process is, is cleaned up here.
        os._exit(status)


def main(arguments: Sequence[str]) -> int:
    """Wait for all ranks; the first that fails ends the others."""
    size, module = int(arguments[0]), arguments[1]
    sys.argv = [module, *arguments[2:]]
    # As torchrun has it; a pool of threads would not outlive the fork either.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    importlib.import_module(module)
    port = free_port()
    ranks = set[int]()
    for rank in range(size):
        process = os.fork()
        if process == 0:
            _run(rank, size, port, module)
        ranks.add(process)
    try:
        while ranks:
            process, status = os.wait()
            ranks.discard(process)
            if status:
                return 1
    finally:
        for process in ranks:
            os.kill(process, signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
