"""The benchmark of decode steps runs to its end on a CPU: what it writes is what plots and pages are made of."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TINY = ("--tiny", "--no-baseline", "--strategy", "local", "--batch", "2", "--prefill", "0", "--inner", "eager")


def written(folder: Path, *options: str, ranks: int = 1) -> dict[str, list[dict[str, Any]]]:
    """Rows of a run by kind."""
    out = folder / "rows.jsonl"
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *start, "benchmarks.bench_decode", *TINY, "--out", str(out), *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in out.read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["kind"], []).append(row)
    return rows


def test_columns_are_checked_and_timed(tmp_path: Path) -> None:
    """On two ranks. Adapters of attention alone have a load of their own, without LoRA at other layers."""
    rows = written(tmp_path, "--kinds", "bd32", "bd32attn", ranks=2)
    assert [(row["kind_of_adapters"], row["rows"]) for row in rows["check"]] == [
        *(("BD r=32 G=8", rows) for rows in (4, 32)),
        ("none", 4),
        *(("BD r=32 G=8, attention", rows) for rows in (4, 32)),
    ]
    assert all(row["error"] < row["allowed"] < row["swapped"] for row in rows["check"])
    assert [row["strategy"] for row in rows["row"]] == ["base", "local", "local"]
    assert all(row["step"] > 0 for row in rows["row"])
    whole, attention = rows["report"]
    assert "mlp.gate_proj" in whole["text"]
    assert "mlp.gate_proj" not in attention["text"]


def test_weights_made_on_the_device_need_no_files(tmp_path: Path) -> None:
    """Nothing to compare logits with; the same times."""
    rows = written(tmp_path, "--kinds", "bd64", "--weights", "device")
    assert "check" not in rows
    assert [(row["strategy"], row["kind_of_adapters"]) for row in rows["row"]] == [
        ("base", "none"),
        ("local", "BD r=64 G=8"),
    ]
