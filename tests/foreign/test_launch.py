"""Real processes over gloo: Hugging Face tensor parallelism, DTensors, the all-to-all, refusals of all ranks."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.distributed.launch import command

_CASES = 7


@pytest.mark.timeout(400)
def test_two_ranks(tmp_path: Path) -> None:
    """All cases of `tests.foreign.worker` pass on two ranks, through Inductor."""
    launch = command(2, "tests.foreign.worker", tmp_path, "--inner", "inductor")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["examples", os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=380, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("case: ") == _CASES, done.stdout
