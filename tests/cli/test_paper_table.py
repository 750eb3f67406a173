"""`benchmarks.paper_table`: its parameters are the paper's, its ratios those of a file of results."""

import json
from pathlib import Path

import pytest

from benchmarks.paper_table import PAPER, lines, main, parameters, read

FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-30-h200x2-decode.jsonl"


@pytest.mark.parametrize(("model", "rank"), PAPER)
def test_parameters_are_the_papers(model: str, rank: int) -> None:
    """Counted from the shapes of every linear layer; the paper's abstract has two digits."""
    assert parameters(model, rank, 8) == pytest.approx(PAPER[model, rank][0], abs=0.006)


def test_fewer_blocks_have_more_parameters() -> None:
    """The twin: another number of blocks is noticed."""
    assert parameters("llama-3.1-8b", 32, 2) > 1.2


def test_ratios_are_those_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(FILE)])
    _, _, *table = capsys.readouterr().out.splitlines()
    _, rows = read(FILE)
    slora, own = (
        rows[strategy, kind, 16, 16] for strategy, kind in (("slora", "ordinary r=16"), ("local", "BD r=32 G=8"))
    )
    step, gpu = (f"{slora[measure] / own[measure]:.2f}" for measure in ("step", "gpu"))
    assert f"| llama-3.1-8b, 2 | 32, 8 | 16, 16 | 0.86 | {step} | {gpu} | 0.86 | 1.63 |" in table
    assert len(table) == 2 * 6, "of two kinds: one adapter, one for each of 16 and 64 rows, and 16 of 64"


def test_other_models_and_blocks_have_no_number_of_the_paper(tmp_path: Path) -> None:
    """And a column without S-LoRA's beside it is left out."""
    found = [json.loads(line) for line in FILE.read_text().splitlines()]
    for line in found:
        line["kind_of_adapters"] = line.get("kind_of_adapters", "").replace("r=32 G=8", "r=24 G=2")
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps(line) + "\n" for line in found if line.get("batch") != 64))
    _, _, *table = lines([changed])
    assert len(table) == 3
    assert all(line.endswith("|  |  |") for line in table)
