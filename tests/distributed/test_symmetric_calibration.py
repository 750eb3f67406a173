"""Which way all-reduces go on a machine is measured over some of its ranks, and all of them come to one answer."""

import json
import subprocess
from pathlib import Path

import pytest

from bdlora_compile.calibrate_symmetric import WAYS, fastest_limits, symmetric_costs
from bdlora_compile.machine import SymmetricLimits, find_machine
from tests.distributed.launch import command

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


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


def test_shipped_costs_are_those_of_the_stored_measurement() -> None:
    """Two H100: limits, and both ways' costs, which lie within 8 % of every size that was measured."""
    rows = [json.loads(line) for line in (RESULTS / "2026-11-25-h100-all-reduce.jsonl").read_text().splitlines()]
    times = {row["bytes"]: {way: row[f"{way}_us"] * 1e-6 for way in WAYS} for row in rows if "bytes" in row}
    found, shipped = symmetric_costs(times, 2), find_machine("h100-nvlink")
    assert found.limits == shipped.symmetric[2]
    for way, link, fitted in (
        ("one_shot", shipped.one_shot[2], found.one_shot),
        ("two_shot", shipped.two_shot[2], found.two_shot),
    ):
        assert fitted is not None
        assert (link.latency, link.bandwidth) == pytest.approx((fitted.latency, fitted.bandwidth), rel=5e-3)
        # Over two ranks a rank sends the payload once, either way.
        off = [link.seconds(size) / of_way[way] - 1 for size, of_way in times.items()]
        assert max(map(abs, off)) < 0.08
        assert max(abs(shipped.all_reduce[2].seconds(size) / of_way[way] - 1) for size, of_way in times.items()) > 0.12
