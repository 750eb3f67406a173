"""Ranks that die or hang, as real processes over gloo: see `tests.distributed.adapter_faults`."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.adapter_faults import CASES


@pytest.mark.timeout(600)
def test_all_others_end_with_an_error(tmp_path: Path) -> None:
    """Within the time that each case allows."""
    command = [sys.executable, "-m", "tests.distributed.adapter_faults", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("case: ") == len(CASES), done.stdout
