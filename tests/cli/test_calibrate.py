"""`bdlora calibrate` on two real ranks and on one, and the machine that it writes."""

import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch.distributed as dist
from rich.console import Console

import bdlora_compile as bd
from bdlora_compile import calibrate
from bdlora_compile.machine import CollectiveKind, find_machine


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


def test_a_machine_of_one_rank_has_no_collectives(tmp_path: Path) -> None:
    """It stands for one rank; who asks for more is told how to measure them."""
    path = tmp_path / "one.json"
    path.write_text(replace(find_machine("cpu-gloo"), all_reduce={}, all_gather={}, symmetric={}).to_json())
    machine = find_machine(path)
    assert machine.is_measured(1)
    assert not machine.is_measured(2)
    with pytest.raises(bd.ConfigError, match="run `bdlora calibrate --tp N` on the ranks that serve"):
        machine.link("all_reduce", 2)


def test_times_that_fit_no_line_name_the_collective() -> None:
    """What was measured on a busy machine; the others are not looked at."""
    kinds: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather_into_tensor")
    good = [calibrate.Point(kinds[0], ranks, size, size) for ranks in (2, 4) for size in (1.0, 2.0)]
    bad = [calibrate.Point(kinds[1], 4, size, 1 / size) for size in (1.0, 2.0)]
    assert calibrate._link([*good, *bad], kinds[0], 4).bandwidth == pytest.approx(1.0)
    said = (
        "fit of all_gather_into_tensor over 4 ranks: found times that do not grow .* end other work .* or try --quick"
    )
    with pytest.raises(bd.ConfigError, match=said):
        calibrate._link([*good, *bad], kinds[1], 4)


def test_a_single_rank_measures_no_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, groups in ((1, []), (2, [2]), (3, [2, 3]), (8, [2, 4, 8])):
        monkeypatch.setattr(dist, "get_world_size", lambda size=size: size)
        assert calibrate._group_sizes() == groups


def test_the_machine_of_h200s_is_what_was_printed() -> None:
    """When it was measured; the twin: another latency would not be there."""
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    then = (results / "2026-11-29-h200x4-calibrate.txt").read_text().splitlines()

    def shown(machine: bd.Machine) -> set[str]:
        text = StringIO()
        calibrate.show(machine, [], Console(file=text, width=80))
        return set(text.getvalue().splitlines()) - {""}

    machine = find_machine("h200-nvlink")
    assert machine.is_measured(4)
    assert shown(machine) <= set(then)
    assert not shown(replace(machine, launch=2e-6)) <= set(then)
