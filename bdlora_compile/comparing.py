"""Two explanations compared: collectives and nodes of the graphs that they have in common, and what CI may forbid."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import pydantic

from bdlora_compile.explanation import ExplainedCollective, ExplainedGraph, ExplainedStage, Explanation
from bdlora_compile.ir import Origin
from bdlora_compile.nodes import NodeView


class Forbidden(Enum):
    """What `bdlora diff --fail-on` may name."""

    NEW_COLLECTIVE = "new-collective"
    """A collective that the first record does not have, or not as often."""
    LORA_COLLECTIVE = "lora-collective"
    """Any collective for LoRA in the second record."""
    GATHER_FALLBACK = "gather-fallback"
    """Any gather that nobody asked for in the second record."""


@dataclass(frozen=True, slots=True)
class CollectiveChange:
    """A collective of the compiled graph, and how often it runs in a forward of each record.

    Attributes:
        what: ``LoRA all_reduce f32[batch, 64] of 8 at self_attn.o_proj``.
        origin: what it communicates for.
        before, after: runs in one forward.
        wire_before, wire_after: bytes that a rank sends in all of them; those that only a run can tell count as 0.
    """

    what: str
    origin: Origin
    before: int
    after: int
    wire_before: int
    wire_after: int

    @property
    def is_changed(self) -> bool:
        """Whether anything differs."""
        return (self.before, self.wire_before) != (self.after, self.wire_after)


@dataclass(frozen=True, slots=True)
class StageChange:
    """The nodes of one stage of both records, by stable key.

    Attributes:
        stage: the pass.
        added, removed, changed: keys.
        same: how many nodes do not differ.
    """

    stage: str
    added: Sequence[str]
    removed: Sequence[str]
    changed: Sequence[str]
    same: int


@dataclass(frozen=True, slots=True)
class GraphChange:
    """One graph of both records.

    Attributes:
        phase: which.
        variant: "with adapters" or "base only".
        collectives: of the compiled graph.
        stages: those that both have.
        only: stages that one of the records lacks.
    """

    phase: str
    variant: str
    collectives: Sequence[CollectiveChange]
    stages: Sequence[StageChange]
    only: Sequence[str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All graphs that both records have, phases that one of them lacks, and what was forbidden and is there."""

    graphs: Sequence[GraphChange]
    only: Sequence[str]
    violations: Sequence[str]

    def to_json(self) -> str:
        """The dataclasses field by field."""
        return pydantic.TypeAdapter(Comparison).dump_json(self, indent=1).decode() + "\n"

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        return not self.only and not any(
            graph.only
            or any(one.is_changed for one in graph.collectives)
            or any(stage.added or stage.removed or stage.changed for stage in graph.stages)
            for graph in self.graphs
        )


def compare(first: Explanation, second: Explanation, forbidden: Sequence[Forbidden] = ()) -> Comparison:
    """What is different in the second record."""
    phases = [graph.phase for graph in first.graphs]
    common = [graph.phase for graph in second.graphs if graph.phase in phases]
    only = [f"{graph.phase} of the first" for graph in first.graphs if graph.phase not in common]
    only += [f"{graph.phase} of the second" for graph in second.graphs if graph.phase not in common]
    graphs = [change for phase in common for change in _compare_graphs(first.graph(phase), second.graph(phase))]
    return Comparison(graphs, only, _violations(second, graphs, only, forbidden))


def _compare_graphs(first: ExplainedGraph, second: ExplainedGraph) -> list[GraphChange]:
    variants: list[tuple[str, Callable[[ExplainedGraph], Sequence[ExplainedStage]]]] = [
        ("with adapters", lambda graph: graph.stages),
        ("base only", lambda graph: graph.base_only),
    ]
    return [
        _compare_stages(first.phase, name, stages_of(first), stages_of(second))
        for name, stages_of in variants
        if stages_of(first) or stages_of(second)
    ]


def _compare_stages(
    phase: str, variant: str, first: Sequence[ExplainedStage], second: Sequence[ExplainedStage]
) -> GraphChange:
    names = {stage.name: stage for stage in first}
    common = [(names[stage.name], stage) for stage in second if stage.name in names]
    unlike = {stage.name for stage in first} ^ {stage.name for stage in second}
    last = [stages[-1].collectives if stages else () for stages in (first, second)]
    return GraphChange(
        phase,
        variant,
        _compare_collectives(*last),
        [_compare_nodes(before, after) for before, after in common],
        sorted(unlike),
    )


def _compare_collectives(
    first: Sequence[ExplainedCollective], second: Sequence[ExplainedCollective]
) -> list[CollectiveChange]:
    runs: dict[tuple[Origin, str], list[int]] = {}
    for side, collectives in enumerate((first, second)):
        for one in collectives:
            counts = runs.setdefault((one.origin, _words(one)), [0, 0, 0, 0])
            counts[side] += one.runs
            counts[2 + side] += one.runs * (one.wire_bytes or 0)
    return [CollectiveChange(what, origin, *counts) for (origin, what), counts in runs.items()]


def _words(one: ExplainedCollective) -> str:
    """A collective without the number of its layer."""
    origin = {Origin.BASE: "base", Origin.LORA: "LoRA", Origin.FALLBACK: "fallback"}[one.origin]
    site = f" at {_inside(one.site, one.layers)}" if one.site else ""
    place = "" if one.layers else ", outside layers"
    return f"{origin} {one.kind} {one.dtype}[{', '.join(one.shape)}] of {one.group_size}{site}{place}"


def _inside(site: str, layers: Sequence[str]) -> str:
    return next((site.removeprefix(f"{layer}.") for layer in layers if site.startswith(f"{layer}.")), site)


def _compare_nodes(first: ExplainedStage, second: ExplainedStage) -> StageChange:
    before = {node.key: node for node in first.nodes}
    after = {node.key: node for node in second.nodes}
    common = [key for key in after if key in before]
    changed = [key for key in common if _facts(before[key]) != _facts(after[key])]
    return StageChange(
        second.name,
        [key for key in after if key not in before],
        [key for key in before if key not in after],
        changed,
        len(common) - len(changed),
    )


def _facts(node: NodeView) -> tuple[object, ...]:
    """What a node computes and where; not which line of the model's code it came from."""
    operands = tuple(node.operands)
    return (node.operator, node.type, node.placement, node.origin, node.site, node.source, node.arguments, operands)


def _violations(
    second: Explanation, graphs: Sequence[GraphChange], only: Sequence[str], forbidden: Sequence[Forbidden]
) -> list[str]:
    found = []
    if Forbidden.NEW_COLLECTIVE in forbidden:
        found += [
            f"{graph.phase}, {graph.variant}: new {one.what}, {one.before} -> {one.after} in a forward"
            for graph in graphs
            for one in graph.collectives
            if one.after > one.before
        ]
        # A graph that cannot be compared is no proof that nothing is new.
        found += [f"{phase}: no graph to compare with" for phase in only]
    wanted = {Forbidden.LORA_COLLECTIVE: Origin.LORA, Forbidden.GATHER_FALLBACK: Origin.FALLBACK}
    for rule, origin in wanted.items():
        if rule in forbidden:
            found += [f"{phase}: {count} x {what}" for phase, what, count in _of_origin(second, origin)]
    return found


def _of_origin(told: Explanation, origin: Origin) -> list[tuple[str, str, int]]:
    found: Counter[tuple[str, str]] = Counter()
    for graph in told.graphs:
        for stages in (graph.stages, graph.base_only):
            for one in stages[-1].collectives if stages else ():
                if one.origin is origin:
                    found[graph.phase, _words(one)] += one.runs
    return [(phase, what, count) for (phase, what), count in found.items()]


RULES: Mapping[str, Forbidden] = {rule.value: rule for rule in Forbidden}
"""The rules by the names that the command line knows."""
