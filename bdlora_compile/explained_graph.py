"""A compiler's report as the record that `explanation.py` describes."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import sympy

from bdlora_compile.census import Collective, number_of
from bdlora_compile.errors import ConfigError
from bdlora_compile.estimate import Phase
from bdlora_compile.explanation import ExplainedCollective, ExplainedGraph, ExplainedRefusal, ExplainedStage
from bdlora_compile.ir import Origin
from bdlora_compile.node_names import renamed
from bdlora_compile.nodes import NodeView
from bdlora_compile.report import Refusal, Report, StageReport

_REMOVING = ("localize", "tag paths", "localize declared")
"""Passes that remove LoRA collectives, or find what can be removed."""


def explain_graph(report: Report, phase: Phase) -> ExplainedGraph:
    """One graph's record; numbers are for the forward that ``phase`` describes."""
    rename = renamed(report.symbols)
    told = ExplainedGraph(
        phase.name,
        phase.batch,
        phase.seq,
        [rename(text) for text in report.inputs],
        _explain_stages(report.stages, phase, rename),
        _explain_stages(report.base_only, phase, rename),
    )
    # Where rows are a fixed number, or nobody knows which size they are, there are no bytes of one token.
    return told if "batch" in report.symbols.values() else _without_tokens(told)


def _without_tokens(told: ExplainedGraph) -> ExplainedGraph:
    def without(stages: Sequence[ExplainedStage]) -> list[ExplainedStage]:
        return [
            replace(stage, collectives=[replace(one, wire_bytes_per_token=None) for one in stage.collectives])
            for stage in stages
        ]

    return replace(told, stages=without(told.stages), base_only=without(told.base_only))


def _explain_stages(stages: Sequence[StageReport], phase: Phase, rename: Callable[[str], str]) -> list[ExplainedStage]:
    refusals: list[Refusal] = []
    told = []
    for stage in stages:
        refusals += stage.stats.refusals if stage.name in _REMOVING else []
        told.append(_explain_stage(stage, phase, rename, refusals))
    return told


def _explain_stage(
    stage: StageReport, phase: Phase, rename: Callable[[str], str], refusals: Sequence[Refusal]
) -> ExplainedStage:
    return ExplainedStage(
        stage.name,
        stage.seconds,
        stage.nodes_before,
        stage.nodes_after,
        stage.stats.matches,
        [ExplainedRefusal(refusal.where, refusal.reason) for refusal in stage.stats.refusals],
        stage.stats.notes,
        [_explain_collective(one, phase, rename, refusals) for one in stage.census.collectives],
        rename(stage.text),
        [_rename_node(node, rename) for node in (stage.view.nodes if stage.view else ())],
        stage.view.layers if stage.view else (),
    )


def _rename_node(node: NodeView, rename: Callable[[str], str]) -> NodeView:
    return replace(node, type=rename(node.type), arguments=rename(node.arguments))


def _explain_collective(
    one: Collective, phase: Phase, rename: Callable[[str], str], refusals: Sequence[Refusal]
) -> ExplainedCollective:
    batch, seq = phase.batch, phase.seq
    return ExplainedCollective(
        one.kind,
        one.group_size,
        [rename(str(size)) for size in one.shape],
        [_number(size, batch, seq) for size in one.shape],
        one.dtype,
        one.origin,
        one.layers,
        one.site,
        rename(str(one.payload_bytes)),
        rename(str(one.wire_bytes)),
        _number(one.payload_bytes, batch, seq),
        _number(one.wire_bytes, batch, seq),
        _number(one.wire_bytes, 1, 1),
        one.key,
        _reason(one, refusals),
    )


def _reason(one: Collective, refusals: Sequence[Refusal]) -> str | None:
    """Why a LoRA collective is still there: what a pass said of its site, or of one of those that were merged."""
    if one.origin is not Origin.LORA or one.site is None:
        return None
    return next((refusal.reason for refusal in refusals if refusal.where in _sites(one.site)), None)


def _sites(label: str) -> list[str]:
    """``a.q_proj``, ``a.k_proj`` of ``a.q_proj+k_proj``."""
    first, *rest = label.split("+")
    module = first.rpartition(".")[0]
    return [label, first, *(f"{module}.{name}" for name in rest)]


def _number(size: sympy.Expr, batch: int, seq: int) -> int | None:
    try:
        return number_of(size, batch, seq)
    except ConfigError:
        return None
