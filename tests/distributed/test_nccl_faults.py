"""Ranks on GPUs that die or hang: see `tests.distributed.nccl_faults`; and four over gloo, where there is no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.nccl_faults import CASES


def run(folder: Path, *arguments: str, seconds: float) -> None:
    command = [sys.executable, "-m", "tests.distributed.nccl_faults", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert done.stdout.count("case: ") == len(CASES), done.stdout


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.timeout(300)
def test_the_other_ranks_end_and_say_who_is_lost(tmp_path: Path) -> None:
    ranks = max(size for size in (2, 4, 8) if size <= torch.cuda.device_count())
    run(tmp_path, "--ranks", str(ranks), seconds=290)


@pytest.mark.timeout(600)
def test_three_others_over_gloo_name_the_lost_one(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Not all of them exchange something with it."""
    if not request.config.getoption("--nightly"):
        pytest.skip("32 processes take four minutes: make nightly")
    run(tmp_path, "--gloo", "--ranks", "4", seconds=590)
