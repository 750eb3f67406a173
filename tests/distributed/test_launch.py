"""Real processes over gloo: what the lock-step interpreter cannot show (process groups, the store, different seeds)."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("arguments", "cases"), [(["--inner", "eager"], 5), (["--inner", "inductor", "--only-local"], 1)]
)
def test_two_ranks_agree_with_peft(tmp_path: Path, arguments: list[str], cases: int) -> None:
    """All cases of `tests.distributed.worker` pass on two ranks; compiling by Inductor takes long, so one of them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.distributed.worker", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("case: ") == cases, done.stdout
