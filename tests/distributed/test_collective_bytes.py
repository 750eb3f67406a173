"""The bytes of collectives in the report are those that a real run communicates."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(300)
def test_bytes_of_a_gloo_run_equal_the_report(tmp_path: Path) -> None:
    """Both layouts, prompt and one token, with and without adapters, half as many kv heads as ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command = [*launcher, "-m", "tests.distributed.collective_bytes", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("case: ") == 2, done.stdout
