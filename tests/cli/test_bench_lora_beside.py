"""The benchmark of where LoRA goes runs to its end on a CPU, and notices LoRA that is not there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_lora_beside
from benchmarks.lora_layers import MODELS, Case, Layers, Model


def test_every_group_is_checked_and_timed(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.bench_lora_beside", "--tiny", "--json", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["group"] for row in rows[:4]] == ["qkv", "o", "gate_up", "down"]
    assert {(row["kind"], row["tokens"], row["active"]) for row in rows} == {
        (kind, tokens, active) for kind in ("bd", "rep") for tokens, active in ((1, 1), (17, 1), (17, 17))
    }
    assert all({"base", *bench_lora_beside.FORMS} <= set(row) for row in rows)


@pytest.mark.parametrize("form", bench_lora_beside.FORMS)
def test_lora_that_is_left_out_ends_it(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "small", Model("small", 256, 128, 256, 1))
    torch.manual_seed(0)
    layers = Layers(Case("small", 1, "bd", 8, 3, 2, 2), 1, "cpu")
    for group in range(4):
        bench_lora_beside.check(layers, group, form)
    layers.scales.zero_()
    with pytest.raises(SystemExit, match=r"qkv, .*: error"):
        bench_lora_beside.check(layers, 0, form)
