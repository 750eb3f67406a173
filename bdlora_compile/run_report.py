"""What a run writes down: a record of each graph that it compiled, compared between the ranks, and torch's trace."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch._logging._internal import trace_structured

from bdlora_compile.estimate import Phase
from bdlora_compile.explained_graph import explain_graph
from bdlora_compile.explanation import Explanation, GeneratedCode, RankComparison
from bdlora_compile.node_names import renamed
from bdlora_compile.nodes import NodeView
from bdlora_compile.report import Report, StageReport
from bdlora_compile.runtime.agreement import Agreement, first_difference

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class WrittenReport:
    """The files of one graph: ``graph-<number>.rank-<rank>.json`` and ``.html``."""

    folder: Path
    stem: str
    told: Explanation

    def write(self) -> None:
        """A file that cannot be written is logged as a warning: a run does not end for lack of a report."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{self.stem}.json").write_text(self.told.to_json(), encoding="utf-8")
            (self.folder / f"{self.stem}.html").write_text(self.told.html(), encoding="utf-8")
        except OSError as error:
            _LOG.warning("no report written to %s: %s", self.folder, error)

    def add_code(self, code: Sequence[GeneratedCode]) -> None:
        """Write again, with what Inductor made of the graph."""
        if code:
            self.told = replace(self.told, code=code)
            self.write()


def write_report(
    folder: Path,
    report: Report,
    agreement: Agreement,
    rank: int,
    *,
    kind: Literal["run", "foreign"],
    phase: str,
    dtype: str = "",
) -> WrittenReport:
    """Write the report of one graph; every rank of a run must call it for every graph, in the same order.

    It is written before anything is compiled: a difference between ranks may end the run. Numbers are those of one
    token of one row.
    """
    ranks = compare_ranks(report, agreement, rank)
    number = len(list(folder.glob(f"graph-*.rank-{rank}.json")))
    told = record_of(report, f"{phase} (graph {number})", ranks, kind, dtype)
    written = WrittenReport(folder, f"graph-{number}.rank-{rank}", told)
    written.write()
    return written


def compare_ranks(report: Report, agreement: Agreement, rank: int) -> RankComparison:
    """How the compiled graphs of all ranks compare; all of them must ask."""
    texts = agreement.exchange("report of a graph", _comparable(report), is_setup=True)
    return RankComparison(rank, len(texts), _difference(texts))


def trace_stages(report: Report) -> None:
    """Hand every stage's text to torch's structured trace (``TORCH_TRACE``), where tlparse lists it."""
    stages = [*report.stages, *report.base_only]
    for number, stage in enumerate(stages):
        _trace(f"bdlora_{number:02d}_{stage.name.replace(' ', '_')}", stage)


def _trace(name: str, stage: StageReport) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: stage.text,
        expect_trace_id=False,
    )


_PARTS = frozenset({"slice", "narrow", "select", "constant_pad_nd", "slice_scatter", "select_scatter"})
"""Operators whose numbers say which part of a value a rank takes: its own, in a model that was sharded by hand."""


def _comparable(report: Report) -> str:
    """The compiled graph, a line a node, in names and numbers that do not depend on the process or the rank."""
    rename = renamed(report.symbols)

    def line(node: NodeView) -> str:
        arguments = "" if node.operator in _PARTS else rename(node.arguments)
        return f"{node.key} {rename(node.type)} {node.placement} {arguments}"

    stages = [stages[-1] for stages in (report.stages, report.base_only) if stages]
    return "\n".join(
        f"{stage.name}: {line(node)}" for stage in stages for node in (stage.view.nodes if stage.view else ())
    )


def _difference(texts: Sequence[str]) -> str | None:
    for rank, text in enumerate(texts):
        if text != texts[0]:
            _, here, there = first_difference(texts[0], text)
            return f"rank {rank} has {there} where rank 0 has {here}"
    return None


def record_of(
    report: Report, phase: str, ranks: RankComparison, kind: Literal["run", "foreign"], dtype: str
) -> Explanation:
    """What a run knows, in the form that `explain` has.

    Numbers are those of one token of one row; of a graph that others sharded those of the inputs that were traced.
    """
    layers = {
        layer
        for stage in report.stages
        for alike in (stage.view.layers if stage.view else ())
        for layer in alike.layers
    }
    return Explanation(
        name=report.model,
        model=report.model,
        tp_size=report.tp_size,
        num_layers=len(layers),
        dtype=dtype,
        strategy="",
        adapters=[],
        max_rank=0,
        batch=1,
        prompt_length=1,
        workload=None,
        machine=None,
        is_extrapolated=False,
        weight_bytes=0,
        adapter_bytes=0,
        decisions=report.decisions,
        graphs=[explain_graph(report, Phase(phase, 1, 1, 1))],
        sites=[],
        estimates=[],
        seconds=report.pass_seconds,
        ranks=ranks,
        kind=kind,
    )
