"""The package's table of plans, `runtime/kernels/tuned.py`, from the rows that `benchmarks/tune.py` measured."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from bdlora_compile.runtime.kernels import tuned
from bdlora_compile.runtime.kernels.tiles import OneLaunch, Plan, bucket_of

TABLE = Path(tuned.__file__).resolve()
TOLERANCE = 4e-3
"""Relative error of a right result: bf16 rounds y to 2^-9, about 2e-3."""

Best = dict[str, dict[tuple[Any, ...], dict[str, Any]]]
"""The row of the fastest right plan, by GPU and shape."""


def table(files: Sequence[Sequence[dict[str, Any]]]) -> str:
    """The text of the table: the fastest right plan of each shape, from the rows of the last file that has it."""
    return TABLE.read_text().partition("TUNED:")[0] + "TUNED: dict[str, dict[Key, Fields]] = " + entries(files)


def fields_of(plan: Plan) -> list[Any]:
    """A plan as it stands in the table; what is not so by default comes last."""
    if isinstance(plan, OneLaunch):
        return [plan.rows, plan.warps, plan.overlap, *([plan.registers] if plan.registers else [])]
    return [astuple(plan.shrink), astuple(plan.expand), plan.overlap]


def _fastest(rows: Sequence[dict[str, Any]]) -> Best:
    best: Best = defaultdict(dict)
    for row in rows:
        width = 1 << (row["width"] - 1).bit_length()
        key = (bucket_of(row["tokens"]), row["in_features"], tuple(row["out_features"]), width)
        if row["error"] < TOLERANCE and row["us"] < best[row["device"]].get(key, {"us": float("inf")})["us"]:
            best[row["device"]][key] = row
    return best


def entries(files: Sequence[Sequence[dict[str, Any]]]) -> str:
    """All GPUs' plans. Times of different files are not compared: their layers differ in their other plans."""
    best: Best = defaultdict(dict)
    for rows in files:
        for device, plans in _fastest(rows).items():
            best[device] |= plans
    text = "{\n"
    for device, plans in best.items():
        text += f'    "{device}": {{\n'
        for key, row in sorted(plans.items()):
            text += f"        {key}: {_as_tuples(row['plan'])},  # layer {row['us']:.1f} us\n"
        text += "    },\n"
    return text + "}\n"


def _as_tuples(plan: Any) -> Any:
    """A plan of a row, whose lists were tuples."""
    return tuple(_as_tuples(part) for part in plan) if isinstance(plan, list) else plan
