"""What `benchmarks/tune.py` makes of the rows it measured."""

from typing import Any

import pytest

from bdlora_compile.runtime.kernels import tiles
from bdlora_compile.runtime.kernels.tiles import Expand, OneLaunch, Plan, Shrink, TwoLaunches
from benchmarks import plan_table

ONE = OneLaunch(8, 8, overlap=False, registers=128)
TWO = TwoLaunches(Shrink(8, 2048, 8), Expand(8, 1024, 4))


def row(plan: Plan, us: float, error: float = 2e-3) -> dict[str, Any]:
    shape = {"device": "a GPU", "tokens": 50, "in_features": 4096, "out_features": [768], "width": 7}
    return {**shape, "plan": plan_table.fields_of(plan), "us": us, "error": error}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        pytest.param([[row(TWO, 2), row(ONE, 1)]], ONE, id="the fastest"),
        pytest.param([[row(TWO, 2), row(ONE, 1, error=1)]], TWO, id="the fastest that is right"),
        pytest.param([[row(ONE, 1)], [row(TWO, 2)]], TWO, id="of the last file"),
        pytest.param([[row(ONE, 1)], []], ONE, id="of the last file that has the shape"),
    ],
)
def test_the_table_takes(files: list[list[dict[str, Any]]], wanted: Plan) -> None:
    """And its entries are read back as plans."""
    found = eval(plan_table.entries(files))["a GPU"]
    assert [*found] == [(64, 4096, (768,), 8)]
    assert tiles._plan(*found[64, 4096, (768,), 8]) == wanted
