"""Which way all-reduces go on a machine is measured over some of its ranks, and all of them come to one answer."""

import subprocess

import pytest

from bdlora_compile.calibrate_symmetric import WAYS, fastest_limits
from bdlora_compile.machine import SymmetricLimits
from tests.distributed.launch import command


@pytest.mark.timeout(120)
def test_ranks_agree_on_the_fastest_ways() -> None:
    """Two of three ranks and all three; no memory on one rank, none anywhere, and ranks of several machines."""
    ran = subprocess.run(
        command(3, "tests.distributed.symmetric_calibration"), capture_output=True, text=True, timeout=110, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    # Ranks share the pipe, and may write between another's text and the end of its line.
    assert all(f"rank {rank} agrees" in ran.stdout for rank in range(3)), ran.stdout


@pytest.mark.parametrize(
    ("fastest", "limits"),
    [
        pytest.param(["one_shot", "one_shot", "two_shot", "nccl"], SymmetricLimits(2, 4), id="in turn"),
        pytest.param(["two_shot", "nccl", "nccl", "nccl"], SymmetricLimits(0, 1), id="never one-shot"),
        pytest.param(["nccl"] * 4, SymmetricLimits(0, 0), id="never"),
        pytest.param(["nccl", "one_shot", "nccl", "nccl"], SymmetricLimits(2, 2), id="small ones by chance"),
    ],
)
def test_limits_are_the_largest_sizes_of_a_way(fastest: list[str], limits: SymmetricLimits) -> None:
    times = {1 << at: {way: 1.0 + (way != best) for way in WAYS} for at, best in enumerate(fastest)}
    assert fastest_limits(times) == limits
