"""Pictures of `bench_decode`'s results, as SVG beside the file: steps by part, and their ratio to the base model's.

python -m benchmarks.plot_decode RESULTS.jsonl                 needs matplotlib
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.decode.timing import PARTS

HOST_WAIT = "waiting for the host"
"""What a loop that reads every token adds to the same steps launched one behind the other; not known of older files,
whose rows were timed in a process that had been profiled."""
OTHERS = "transformers"
"""Is left out: a bar several times as long as all others."""
STRETCHED = "collectives"
"""What a profile makes longer: ranks whose launches it slows unevenly wait for one another there."""


def label(row: dict[str, Any]) -> str:
    """A row's column and batch."""
    kind = "" if row["kind_of_adapters"] == "none" else f", {row['kind_of_adapters']}"
    adapters = "" if row["kind_of_adapters"] == "none" else f", {row['adapters']} adapters"
    return f"{row['strategy']}{kind}\n{row['batch']} rows{adapters}"


def with_parts(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Our rows with what a profile found of each, and `HOST_WAIT`; older files have parts in the row itself."""

    def key(line: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(line[name] for name in ("strategy", "kind_of_adapters", "batch", "adapters", "context"))

    profiles = {key(line): line["parts"] for line in lines if line["kind"] == "parts"}
    rows = [dict(line) for line in lines if line["kind"] == "row" and line["strategy"] != OTHERS]
    return [
        row if "parts" in row else {**row, "parts": fitted(profiles.get(key(row), {}), row["gpu"], row["step"])}
        for row in rows
    ]


def fitted(parts: Mapping[str, float], gpu: float, step: float) -> dict[str, float]:
    """The parts of a profile and `HOST_WAIT`; `STRETCHED` is shortened, to nothing if need be, so that they make up
    the step that was timed without a profile."""
    excess = max(sum(parts.values()) - gpu, 0.0)
    stretched = {STRETCHED: max(parts[STRETCHED] - excess, 0.0)} if parts else {}
    return {**parts, **stretched, HOST_WAIT: step - gpu}


def stacked(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """A bar for each row, from the parts that a profile found to the wall time of a step."""
    places = range(len(rows))
    ends = [0.0] * len(rows)
    for part in (*PARTS, HOST_WAIT):
        values = [row["parts"].get(part, 0.0) for row in rows]
        axes.barh(places, values, left=ends, label=part)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    axes.set_yticks(places, [label(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a decode step")
    axes.legend(ncols=4, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1))


def ratios(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """The GPU's time of a step over the base model's, by rows of the batch: an adapter for each, and one for all."""
    base = {row["batch"]: row["gpu"] for row in rows if row["strategy"] == "base"}
    own = [row for row in rows if row["kind_of_adapters"] != "none"]
    for number, column in enumerate(dict.fromkeys((row["strategy"], row["kind_of_adapters"]) for row in own)):
        for style, is_shown in (
            ("-", lambda row: row["adapters"] == row["batch"]),
            (":", lambda row: row["adapters"] == 1),
        ):
            points = sorted(
                (row["batch"], row["gpu"] / base[row["batch"]])
                for row in own
                if (row["strategy"], row["kind_of_adapters"]) == column and is_shown(row)
            )
            label = ", ".join(column) if style == "-" else None
            axes.plot(*zip(*points, strict=True), style, marker="o", color=f"C{number}", label=label)
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(base), [str(batch) for batch in sorted(base)])
    axes.set_xlabel("rows, an adapter each (dotted: one for all)")
    axes.set_ylabel("GPU time of a step, base is 1")
    axes.legend(fontsize="small")


def main() -> None:
    """Write both pictures into one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    file = parser.parse_args().results
    import matplotlib  # wanted here alone

    matplotlib.use("svg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rows = with_parts(lines)
    run = next(line for line in lines if line["kind"] == "run")
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 0.45 * len(rows) + 1.5), width_ratios=[2, 1], layout="constrained"
    )
    stacked(left, rows)
    ratios(right, rows)
    figure.suptitle(f"{run['options']['model']}, {run['tp']} ranks, {run['device']}, {run['date']}")
    figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
