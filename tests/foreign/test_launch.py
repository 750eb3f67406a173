"""Real processes over gloo: Hugging Face tensor parallelism, DTensors, the all-to-all, refusals of all ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_CASES = 6


@pytest.mark.timeout(400)
def test_two_ranks(tmp_path: Path) -> None:
    """All cases of `tests.foreign.worker` pass on two ranks, through Inductor."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.foreign.worker", str(tmp_path), "--inner", "inductor"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["examples", os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("case: ") == _CASES, done.stdout
