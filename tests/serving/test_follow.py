"""Rank 0 drives, another process follows, over gloo."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.launch import free_port
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


@dataclass(frozen=True)
class Ended:
    """What the two ranks printed, and how they ended."""

    out: str
    status: tuple[int, int]


def launch(folder: Path, kind: str) -> Ended:
    """Two ranks without a launcher that would end one when the other dies."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", "-m", "tests.serving.follow_worker", str(folder), kind]
    with (folder / f"{kind}.txt").open("w+") as out:
        ranks = [
            subprocess.Popen(
                command, stdout=out, stderr=out, env={**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank in range(2)
        ]
        try:
            first, second = (rank.wait(timeout=280) for rank in ranks)
        finally:
            for rank in ranks:
                rank.kill()
        out.seek(0)
        return Ended(out.read(), (first, second))


@pytest.mark.timeout(300)
def test_rank_0_alone_is_called(folder: Path) -> None:
    """All cases of `follow_worker.Cases` pass on rank 0, and the other rank leaves when it does."""
    done = launch(folder, "cases")
    assert done.status == (0, 0), done.out[-6000:]
    assert done.out.count("case: ") == 7, done.out
    assert "rank 0 left" in done.out
    assert "rank 1 left" in done.out


@pytest.mark.timeout(300)
def test_a_killed_rank_ends_all(folder: Path) -> None:
    """The stream ends with the error, requests are refused, and no process is left."""
    done = launch(folder, "lost")
    assert "ended: error LostRankError" in done.out, done.out[-6000:]
    assert "case: lost" in done.out, done.out[-6000:]
    assert done.status[1] == -signal.SIGKILL
    assert done.status[0] != 0
