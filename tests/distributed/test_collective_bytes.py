"""The bytes of collectives in the report are those that a real run communicates."""

import subprocess
from pathlib import Path

import pytest

from tests.distributed.launch import command


@pytest.mark.timeout(300)
def test_bytes_of_a_gloo_run_equal_the_report(tmp_path: Path) -> None:
    """Both layouts, prompt and one token, with and without adapters, half as many kv heads as ranks."""
    launch = command(4, "tests.distributed.collective_bytes", tmp_path)
    done = subprocess.run(launch, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("case: ") == 2, done.stdout
