"""The tables of decode steps in docs/performance.md hold what the files of results beside them say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COLUMNS = {
    "base": ("base", "none"),
    "local, BD r = 32, G = 8": ("local", "BD r=32 G=8"),
    "local, BD r = 24, G = 2 *": ("local", "BD r=24 G=2"),
    "local, ordinary r = 16": ("local", "ordinary r=16"),
    "S-LoRA, ordinary r = 16": ("slora", "ordinary r=16"),
}
"""Names on the page, and strategy and kind of adapters in the files."""
FILES = {
    "local, BD r = 24, G = 2 *": "2026-11-29-h200x2-decode-before-mixed.jsonl",
    "": "2026-11-29-h200x2-decode-mixed.jsonl",
}
"""Of rows that are from other runs, and of the others."""


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


@pytest.mark.parametrize("row", [row for row in table() if row[0] in COLUMNS], ids=lambda row: f"{row[0]} {row[1]}")
def test_a_row_of_the_page_is_in_its_file(row: list[str]) -> None:
    name, case, *numbers = row
    results = measured(FILES.get(name, FILES[""]))
    batch, adapters = (int(number) for number in case.split(","))
    found = results[*COLUMNS[name], batch, max(adapters, 1)]
    base = results["base", "none", batch, 1]
    exact = (found["step"], found["step"] / base["step"], found["gpu"], found["gpu"] / base["gpu"], found["floor"])
    assert numbers == [f"{value:.2f}" for value in exact]


def test_the_table_has_rows() -> None:
    """And those that are compared with no file are the two kinds that are older."""
    names = {row[0] for row in table()}
    assert set(COLUMNS) < names
    assert {name for name in names if name not in COLUMNS} == {
        "local, BD r = 32, attention alone *",
        "transformers, no LoRA *",
    }
