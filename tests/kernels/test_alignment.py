"""Kernels compiled for a GPU: sizes that are multiples of 8 get loads of 16 bytes, and only they; who waits where."""

import json
import os
import subprocess
import sys
from typing import Any


def compiled(module: str) -> Any:
    """What a module prints that compiles kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", module], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_odd_sizes_are_not_taken_for_multiples_of_eight() -> None:
    """Each kernel has both: wide loads for the one branch, narrow ones for the other, which would fault otherwise."""
    for kernel, (wide, narrow) in compiled("tests.kernels.compile_for_gpu").items():
        assert wide > 0, kernel
        assert narrow > 0, kernel


def test_an_exchange_releases_and_acquires_for_the_whole_system() -> None:
    """All threads' values are written, then peers are told; all threads read the peers' after one of them was told.

    Between a thread's writes and another's release, and an acquire and other threads' reads, there is a barrier.
    """
    order = compiled("tests.kernels.compile_norm")
    assert "narrow load" not in order
    assert "narrow store" not in order
    tell, wait = order.index("release"), order.index("acquire")
    last = len(order) - 1 - order[::-1].index("acquire")
    assert order[:tell] == ["wide load", "wait", "wide load", "wide load", "wide store", "barrier"]
    assert tell < wait <= last
    assert "wide load" not in order[tell:last]
    rest = order[last + 1 :]
    assert rest[0] == "barrier"
    assert rest.index("barrier") < rest.index("let start") < rest.index("wide load")
    assert rest.count("wide load") == 3, "one of each peer"
