"""Decode steps of `bench_decode` beside what BD-LoRA's paper reports, as a table in Markdown.

    python -m benchmarks.paper_table decode-8b.jsonl decode-70b.jsonl

Ours is a decode step, S-LoRA's layout over block-diagonal adapters in local layout, both with our kernels and over the
same transport. The paper's is a whole run on 8 x A100 against its own S-LoRA in an older engine, and the best that it
found ("up to"): arXiv 2510.23346v2, abstract. So the columns are context for each other, not one measurement.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bdlora_compile.deploying import served_sites
from bdlora_compile.factors import Layout
from bdlora_compile.known_models import known_config
from bdlora_compile.placement import Mesh
from bdlora_compile.sites import Role
from bdlora_compile.timing import Declared, declared_elements

ORDINARY_RANK = 16
"""Of the adapters that S-LoRA serves, here and in the paper."""
PAPER: Mapping[tuple[str, int], tuple[float, float]] = {
    ("llama-3.1-70b", 32): (0.87, 1.79),
    ("llama-3.1-70b", 64): (1.74, 1.23),
    ("llama-3.1-8b", 32): (0.86, 1.63),
    ("llama-3.1-8b", 64): (1.73, 1.30),
}
"""By model and R of block-diagonal adapters: parameters over the ordinary adapters', and S-LoRA's time over BD's."""
HEAD = "model, GPUs | R, G | rows, adapters | parameters | step | GPU | the paper: parameters | up to"
Rows = Mapping[tuple[str, str, int, int], Mapping[str, Any]]


def read(file: Path) -> tuple[Mapping[str, Any], Rows]:
    """The run's own line, and its rows by strategy, kind of adapters, batch and adapters."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    run = next(line for line in lines if line["kind"] == "run")
    rows = [line for line in lines if line["kind"] == "row"]
    return run, {(row["strategy"], row["kind_of_adapters"], row["batch"], row["adapters"]): row for row in rows}


def parameters(model: str, rank: int, blocks: int) -> float:
    """Parameters of a block-diagonal adapter over those of an ordinary one of rank 16, on every linear layer."""
    with torch.device("meta"):
        sites = served_sites(AutoModelForCausalLM.from_config(known_config(model)), Mesh(1), strict=True)

    def count(rank: int, blocks: int) -> int:
        declared = {role: Declared.along_split_dim(role, rank, blocks) for role in Role}
        return sum(sum(declared_elements(site, declared[site.role], Layout.LOCAL, Mesh(1))) for site in sites.values())

    return count(rank, blocks) / count(ORDINARY_RANK, 1)


def lines(files: Sequence[Path]) -> Iterator[str]:
    """The table."""
    yield f"| {HEAD} |"
    yield "| --- " * (HEAD.count("|") + 1) + "|"
    for file in files:
        run, rows = read(file)
        model = run["options"]["model"]
        for (strategy, kind, batch, adapters), row in rows.items():
            other = rows.get(("slora", f"ordinary r={ORDINARY_RANK}", batch, adapters))
            if strategy != "local" or not kind.startswith("BD ") or "attention" in kind or other is None:
                continue
            rank, blocks = (int(word.partition("=")[2]) for word in kind.split()[1:3])
            told = PAPER.get((model, rank)) if blocks == 8 else None
            alone = " (one alone, without collectives)" if row["fake"] else ""
            cells = [f"{model}, {run['tp']}{alone}", f"{rank}, {blocks}", f"{batch}, {adapters}"]
            cells += [f"{parameters(model, rank, blocks):.2f}"]
            cells += [f"{other[measure] / row[measure]:.2f}" for measure in ("step", "gpu")]
            cells += [f"{number:.2f}" for number in told] if told else ["", ""]
            yield f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    for line in lines(parser.parse_args(arguments).results):
        print(line)


if __name__ == "__main__":
    main()
