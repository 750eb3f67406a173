"""The example with replicas: two one-process replicas on this machine, requests that follow their adapter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'bdlora-compile[ray]'")

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.timeout(300)
def test_requests_go_where_their_adapter_is(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In a process of its own: Ray leaves threads and settings behind."""
    if not request.config.getoption("--nightly"):
        pytest.skip("Ray and two servers take a minute: make nightly")
    environment = os.environ | {
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'examples'}",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, "-m", "tests.serving.http.ray_worker", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=environment, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "requests followed their adapters" in done.stdout
    assert "a lost group was replaced" in done.stdout
