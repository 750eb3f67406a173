"""`bdlora calibrate` on two real ranks, and the machine that it writes."""

import subprocess
import sys
from pathlib import Path

import pytest

from bdlora_compile.machine import find_machine


@pytest.mark.timeout(180)
def test_two_ranks_measure_a_machine(tmp_path: Path) -> None:
    """The file is read back as a machine; its numbers are those of some computer, not of none."""
    out = tmp_path / "machine.json"
    command = [sys.executable, "-c", "from bdlora_compile.cli import app; app()", "calibrate"]
    command += ["--tp", "2", "--quick", "--name", "here", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    machine = find_machine(out)
    assert machine.name == "here"
    assert "measured us" in done.stdout
    assert "fitted us" in done.stdout
    # A computer reads between 0.1 GB and 100 TB a second, and needs between 10 ns and 10 ms for a call.
    assert 1e8 < machine.memory_bandwidth < 1e14
    assert 1e8 < machine.flops < 1e16
    assert 1e-8 < machine.launch < 1e-2
    assert machine.is_measured(2)
    for link in (machine.link("all_reduce", 2), machine.link("all_gather_into_tensor", 2)):
        assert 1e-7 < link.latency < 1
        assert 1e5 < link.bandwidth < 1e13
