"""Rank 0 drives, another process follows, over gloo."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import AdapterSpec, save_adapter, save_model
from tests.serving.conftest import SPEC


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and adapters a, b and c."""
    made = tmp_path_factory.mktemp("follow")
    save_model(SPEC, made / "model")
    for seed, name in enumerate("abc"):
        save_adapter(AdapterSpec(rank=4, nblocks=2 * (seed % 2)), made / "model", made / name, seed)
    return made


def launch(folder: Path, kind: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.serving.follow_worker", str(folder), kind]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.timeout(300)
def test_rank_0_alone_is_called(folder: Path) -> None:
    """All cases of `follow_worker.Cases` pass on rank 0, and the other rank leaves when it does."""
    done = launch(folder, "cases")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("case: ") == 7, done.stdout
    assert "rank 0 left" in done.stdout
    assert "rank 1 left" in done.stdout


@pytest.mark.timeout(300)
def test_a_killed_rank_ends_all(folder: Path) -> None:
    """The stream ends with the error, requests are refused, and no process is left."""
    done = launch(folder, "lost")
    assert "ended: error LostRankError" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]
    assert "case: lost" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.returncode != 0
