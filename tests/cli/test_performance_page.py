"""The tables of decode steps in docs/performance.md hold what the files of results beside them say."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COLUMNS = {
    "base": ("base", "none"),
    "local, BD r = 32, G = 8": ("local", "BD r=32 G=8"),
    "local, BD r = 24, G = 2": ("local", "BD r=24 G=2"),
    "local, ordinary r = 16": ("local", "ordinary r=16"),
    "S-LoRA, ordinary r = 16": ("slora", "ordinary r=16"),
    "S-LoRA, ordinary r = 16 *": ("slora 4", "ordinary r=16"),
    "local, BD r = 32, attention alone *": ("local", "BD r=32 G=8, attention"),
    "local, ordinary r = 16, attention alone *": ("local", "ordinary r=16, attention"),
    "S-LoRA, ordinary r = 16, attention alone *": ("slora", "ordinary r=16, attention"),
    "transformers, no LoRA": ("transformers", "none"),
}
"""Names on the page, and strategy and kind of adapters in the files."""
FILES = {
    "attention alone *": "2026-11-29-h200x2-decode-attention.jsonl",
    "*": "2026-11-29-h200x2-decode-delta-mixed.jsonl",
    "": "2026-11-29-h200x2-decode.jsonl",
}
"""Of the page's rows, by how their names end; the first that fits."""
STEPS = "2026-11-29-h200x2-loop-gaps.txt"
IN_STEPS = {"base": "base", "local, BD r = 32, G = 8": "bd"}
"""Names there."""


def measured(file: str) -> dict[tuple[str, str, int, int], dict[str, Any]]:
    """Rows of a run by strategy, kind of adapters, rows and adapters."""
    lines = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / file).read_text().splitlines()]
    return {
        (row["strategy"], row["kind_of_adapters"], row["batch"], row["adapters"]): row
        for row in lines
        if row["kind"] == "row"
    }


def table() -> list[list[str]]:
    """Cells of the table of two H200."""
    page = (ROOT / "docs" / "performance.md").read_text()
    rows = re.search(r"\*\*Two H200\*\*.*?\n\| --- [^\n]*\n(.*?)\n\n", page, re.DOTALL)
    assert rows is not None
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines()]


def steps() -> dict[tuple[str, int, int], float]:
    """Steps of a loop that reads each token, medians of all forms of graphs, by name, rows and adapters."""
    text = (ROOT / "benchmarks" / "results" / STEPS).read_text()
    found: dict[tuple[str, int, int], list[float]] = {}
    for name, rows, adapters, step in re.findall(r"^(\w+) (\d+)/(\d+) [\d,one]+ +step ([\d.]+)", text, re.MULTILINE):
        found.setdefault((name, int(rows), int(adapters)), []).append(float(step))
    return {case: statistics.median(times) for case, times in found.items()}


@pytest.mark.parametrize("row", table(), ids=lambda row: f"{row[0]} {row[1]}")
def test_a_row_of_the_page_is_in_its_file(row: list[str]) -> None:
    name, case, *numbers, step, to_base = row
    results = measured(next(file for end, file in FILES.items() if name.endswith(end)))
    batch, adapters = (int(number) for number in case.split(","))
    found, base = results[*COLUMNS[name], batch, max(adapters, 1)], results["base", "none", batch, 1]
    exact = [found["gpu"], found["gpu"] / base["gpu"], *([found["floor"]] if found["floor"] else [])]
    assert [number for number in numbers if number] == [f"{value:.2f}" for value in exact]
    if name.startswith("transformers"):
        assert (step, to_base) == (f"{found['step']:.1f}", "")
    elif step:
        own = steps()[IN_STEPS[name], batch, adapters]
        assert (step, to_base) == (f"{own:.2f}", f"{own / steps()['base', batch, 0]:.2f}")


def test_the_table_has_rows() -> None:
    """Of all columns, some with steps."""
    assert {row[0] for row in table()} == set(COLUMNS)
    assert sum(bool(row[-1]) for row in table()) == 5
