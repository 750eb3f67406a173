"""Kernels compiled for a GPU: sizes that are multiples of 8 get loads of 16 bytes, and only they."""

import json
import os
import subprocess
import sys


def test_odd_sizes_are_not_taken_for_multiples_of_eight() -> None:
    """Each kernel has both: wide loads for the one branch, narrow ones for the other, which would fault otherwise."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_for_gpu"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    for kernel, (wide, narrow) in json.loads(ran.stdout).items():
        assert wide > 0, kernel
        assert narrow > 0, kernel
