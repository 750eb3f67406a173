"""The load benchmark in small: many streaming clients over few rows, every token checked, nothing left."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.timeout(280)
def test_clients_that_come_and_go_leave_nothing() -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "load_serving.py")]
    command += ["--seconds", "6", "--clients", "16", "--adapters", "8"]
    # The package of this checkout, also where another one is installed.
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=260, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "all answers equal PEFT's, nothing is left" in done.stdout
