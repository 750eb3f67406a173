"""Ranks on GPUs that die or hang: see `tests.distributed.nccl_faults`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.nccl_faults import CASES


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.timeout(180)
def test_the_other_ranks_end_and_say_who_is_lost(tmp_path: Path) -> None:
    ranks = max(size for size in (2, 4, 8) if size <= torch.cuda.device_count())
    command = [sys.executable, "-m", "tests.distributed.nccl_faults", str(tmp_path), "--ranks", str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert done.stdout.count("case: ") == len(CASES), done.stdout
