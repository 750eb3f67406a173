"""The kernel that exchanges, adds and norms, on two ranks that run at once; and graphs that call its operator."""

import subprocess
from pathlib import Path

import pytest

from tests.distributed.launch import command


@pytest.mark.timeout(600)
def test_two_ranks_exchange_and_norm(tmp_path: Path) -> None:
    """All checks of `tests.distributed.norm_ranks` pass."""
    launch = command(2, "tests.distributed.norm_ranks", tmp_path)
    done = subprocess.run(launch, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("case: ") == 6, done.stdout
