"""The short version of `benchmarks/bench_adapter_churn.py`: real processes, more adapters than fit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_rows_are_right_while_adapters_come_and_go() -> None:
    """Every row of every step is PEFT's (the script asserts it); adapters do come from all tiers."""
    options = ["--model", "tiny", "--adapters", "40", "--pool", "4", "--rows", "4", "--steps", "60"]
    options += ["--host-bytes", "100000"]
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_adapter_churn.py"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "recompiles 0" in done.stdout
    counts = re.search(r"(\d+) adapters brought in, (\d+) evicted, (\d+) read from disk", done.stdout)
    assert counts is not None, done.stdout
    assert all(int(count) >= 5 for count in counts.groups()), done.stdout
