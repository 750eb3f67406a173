"""Real processes over gloo: what the lock-step interpreter cannot show (process groups, the store, different seeds)."""

import subprocess
from pathlib import Path

import pytest

from tests.distributed.launch import command


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("arguments", "cases"), [(["--inner", "eager"], 5), (["--inner", "inductor", "--only-local"], 1)]
)
def test_two_ranks_agree_with_peft(tmp_path: Path, arguments: list[str], cases: int) -> None:
    """All cases of `tests.distributed.worker` pass on two ranks; compiling by Inductor takes long, so one of them."""
    launch = command(2, "tests.distributed.worker", tmp_path, *arguments)
    done = subprocess.run(launch, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("case: ") == cases, done.stdout
