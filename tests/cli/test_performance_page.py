"""The tables of decode steps in docs/performance.md hold what the files of results beside them say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper_table import lines as paper_lines

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = {
    "base": ("base", "none"),
    "local, BD r = 32, G = 8": ("local", "BD r=32 G=8"),
    "local, BD r = 24, G = 2": ("local", "BD r=24 G=2"),
    "local, BD r = 64, G = 8": ("local", "BD r=64 G=8"),
    "local, ordinary r = 16": ("local", "ordinary r=16"),
    "S-LoRA, ordinary r = 16": ("slora", "ordinary r=16"),
    "local, BD r = 32, attention alone": ("local", "BD r=32 G=8, attention"),
    "local, ordinary r = 16, attention alone": ("local", "ordinary r=16, attention"),
    "S-LoRA, ordinary r = 16, attention alone": ("slora", "ordinary r=16, attention"),
    "transformers, no LoRA": ("transformers", "none"),
}
"""Names on the page, and strategy and kind of adapters in the files."""
RUNS = {"a": "2026-11-30-h200x2-decode.jsonl", "b": "2026-11-30-h200x2-decode-attention.jsonl"}
OF_FOUR = ("2026-11-29-h200x4-decode-8b.jsonl", "2026-11-29-h200x4-decode-70b.jsonl")
Rows = dict[tuple[str, str, int, int], dict[str, Any]]


def measured(file: str) -> Rows:
    """Rows of a run by strategy, kind of adapters, rows and adapters."""
    found = [json.loads(line) for line in (RESULTS / file).read_text().splitlines()]
    return {
        (row["strategy"], row["kind_of_adapters"], row["batch"], row["adapters"]): row
        for row in found
        if row["kind"] == "row"
    }


def table(title: str) -> list[list[str]]:
    """Cells of the first table behind a title."""
    page = (ROOT / "docs" / "performance.md").read_text()
    rows = re.search(rf"\*\*{title}\*\*.*?\n\| --- [^\n]*\n(.*?)\n\n", page, re.DOTALL)
    assert rows is not None
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines()]


def of(results: Rows, name: str, case: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """A row of a file and its base, if it is there."""
    batch, adapters = (int(number) for number in case.split(","))
    found = results.get((*COLUMNS[name], batch, max(adapters, 1)))
    return (found, results["base", "none", batch, 1]) if found else None


def told(row: dict[str, Any], base: dict[str, Any], measure: str) -> list[str]:
    """Milliseconds and their ratio to the base model's, as the page has them."""
    return [f"{row[measure]:.2f}", f"{row[measure] / base[measure]:.2f}"]


@pytest.mark.parametrize("row", table("Two H200"), ids=lambda row: f"{row[0]} {row[1]}")
def test_a_row_of_two_is_in_its_file(row: list[str]) -> None:
    name, case, run, *numbers = row
    found = of(measured(RUNS[run]), name, case)
    assert found is not None
    floor = [f"{found[0]['floor']:.2f}"] if found[0]["floor"] else [""]
    assert numbers == [*told(*found, "gpu"), *floor, *told(*found, "step")]


@pytest.mark.parametrize("row", table("Four H200"), ids=lambda row: f"{row[0]} {row[1]}")
def test_a_row_of_four_is_in_its_files(row: list[str]) -> None:
    name, case, *numbers = row
    for file, cells in zip(OF_FOUR, (numbers[:4], numbers[4:]), strict=True):
        found = of(measured(file), name, case)
        assert cells == ([*told(*found, "gpu"), *told(*found, "step")] if found else [""] * 4)


def test_the_tables_have_all_rows() -> None:
    """All that was measured; base's rows of the second run are left out."""
    two, four = table("Two H200"), table("Four H200")
    assert {row[0] for row in (*two, *four)} == set(COLUMNS)
    assert len(measured(RUNS["a"])) == sum(row[2] == "a" for row in two) == 27
    assert len(measured(RUNS["b"])) - 3 == sum(row[2] == "b" for row in two) == 21
    assert len(measured(OF_FOUR[0])) == len(four) == 22


def test_what_stands_beside_the_paper_is_the_tools_output() -> None:
    page = (ROOT / "docs" / "performance.md").read_text().splitlines()
    own = [line for line in paper_lines([RESULTS / file for file in OF_FOUR]) if "| 16, 16 |" in line]
    assert len(own) == 4
    assert all(line in page for line in own)


def test_each_file_of_results_is_told_of_somewhere() -> None:
    """What nothing names is of no use to a reader; git keeps what was there."""
    texts = [*(ROOT / "docs").glob("*.md"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bdlora_compile").rglob("*.json")]
    told = "".join(path.read_text() for path in texts)
    assert [path.name for path in RESULTS.iterdir() if path.name not in told] == []
