"""What the compiler did to one graph: stages, matches, refusals and collectives, before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bdlora_compile.census import OUTSIDE, Census
from bdlora_compile.ir import Origin
from bdlora_compile.nodes import GraphView
from bdlora_compile.runtime.step_graphs import StepGraphStats
from bdlora_compile.strategy import Decision


@dataclass(frozen=True, slots=True)
class Refusal:
    """A place where a pass did not apply, and why."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class PassStats:
    """What one pass did.

    Attributes:
        matches: places that it rewrote.
        refusals: places that it looked at and left.
        notes: counts worth reading, by name.
    """

    matches: int = 0
    refusals: Sequence[Refusal] = ()
    notes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StageReport:
    """One pass over one graph.

    Attributes:
        name: the pass.
        seconds: of its rewrite and verification.
        nodes_before, nodes_after: nodes of the graph.
        stats: what it did.
        census: collectives after it.
        text: the graph after it.
        view: its nodes as the inspector shows them, where somebody wants to see them.
    """

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    stats: PassStats
    census: Census
    text: str
    view: GraphView | None


@dataclass(slots=True)
class Report:
    """What the compiler did to one graph.

    Attributes:
        model: class of the model.
        tp_size: tensor-parallel degree.
        inputs: types of the forward's own inputs.
        stages: one for each pass, in order.
        base_only: what a copy of the last stage went through for batches without adapters.
        decisions: why each group of LoRA sites has its layout.
        symbols: what symbolic sizes are called in reports, by this process's names.
        tracing: which layers Dynamo traced, and why not fewer.
        all_reduce: which transport sums over the ranks, and why.
        norms: which all-reduces of each graph add the residual and norm as well, where the transport can; alike layers
            count once.
        rotary: where in each graph rotations and the write to the cache are one operator, on GPUs; alike layers count
            once.
        paths: which LoRA paths lie beside their base product, and why others do not; None where no kernels run.
        attention: which attention the layers have, and why.
        rebuilt: bytes of the factors that ranks exchange at load by one all-to-all, by name; beside the forward.
        emit_seconds: time to read and bind this rank's values and to compile the regions.
        step_graphs: what became of its forwards so far; None where they are not recorded.
    """

    model: str
    tp_size: int
    inputs: Sequence[str]
    stages: list[StageReport] = field(default_factory=list)
    base_only: list[StageReport] = field(default_factory=list)
    decisions: Sequence[Decision] = ()
    symbols: Mapping[str, str] = field(default_factory=dict)
    tracing: str = ""
    all_reduce: str = ""
    norms: dict[str, PassStats] = field(default_factory=dict)
    rotary: dict[str, PassStats] = field(default_factory=dict)
    paths: PassStats | None = None
    attention: str = ""
    rebuilt: Mapping[str, int] = field(default_factory=dict)
    emit_seconds: float = 0.0
    step_graphs: StepGraphStats | None = None

    @property
    def pass_seconds(self) -> float:
        """Time of all passes, verification included."""
        return sum(stage.seconds for stage in (*self.stages, *self.base_only))

    def stage(self, name: str) -> StageReport:
        """The report of one pass."""
        return next(stage for stage in self.stages if stage.name == name)

    def summary(self) -> str:
        """A short text: passes with matches, refusals, collectives, layouts with their reasons."""
        lines = [f"{self.model} on {self.tp_size} ranks, inputs {', '.join(self.inputs)}"]
        for stage in (*self.stages, *self.base_only):
            base, lora = stage.census.total(Origin.BASE), stage.census.total(Origin.LORA)
            fallback = stage.census.total(Origin.FALLBACK)
            counts = f"collectives: base {base}, LoRA {lora}" + (f", fallback {fallback}" if fallback else "")
            lines.append(
                f"  {stage.name:<19}{stage.nodes_before:>6} -> {stage.nodes_after:<6}nodes "
                f"{stage.stats.matches:>5} matches  {stage.seconds:6.2f} s  {counts}"
            )
            lines += _refusal_lines(stage.stats.refusals)
        if self.stages and self.tp_size > 1:
            lines += _byte_lines(self.stages[-1].census)
        if self.rebuilt:
            size = sum(self.rebuilt.values())
            lines.append(f"  rebuilt at load by one all-to-all: {len(self.rebuilt)} factors, {size} bytes on a rank")
        if self.tracing:
            lines.append(f"  traced: {self.tracing}")
        if self.all_reduce:
            lines.append(f"  all-reduce: {self.all_reduce}")
        joined = {"all-reduce, residual and norm": self.norms, "rotations and write to the cache": self.rotary}
        for what, graphs in joined.items():
            for graph, stats in graphs.items():
                places = stats.matches + len(stats.refusals)
                lines.append(f"  {what} in one, {graph}: {stats.matches} of {places}")
                lines += _refusal_lines(stats.refusals)
        if self.paths is not None:
            total = self.paths.notes["paths"]
            lines.append(f"  LoRA beside the base product: {self.paths.matches} of {total} paths")
            lines += _refusal_lines(self.paths.refusals)
        if self.attention:
            lines.append(f"  attention: {self.attention}")
        lines += [f"  layout of {decision.text()}" for decision in self.decisions]
        lines.append(f"  emit {self.emit_seconds:.2f} s")
        if self.step_graphs is not None:
            lines.append(f"  {self.step_graphs.text()}")
        return "\n".join(lines)


def _byte_lines(census: Census) -> list[str]:
    """What a rank sends in one forward; see `census.py` for what is counted."""
    found = {origin: census.bytes_of_forward("wire", origin) for origin in Origin}
    outside = census.bytes_of_layer(OUTSIDE, "wire")
    parts = [f"{origin.value} {size}" for origin, size in found.items() if size != 0]
    return [f"  a rank sends in one forward (ring): {', '.join(parts)} bytes; {outside} of them outside layers"]


def _refusal_lines(refusals: Sequence[Refusal]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for refusal in refusals:
        by_reason.setdefault(refusal.reason, []).append(refusal.where)
    return [
        f"    left {places[0]}" + (f" and {len(places) - 1} more" if len(places) > 1 else "") + f": {reason}"
        for reason, places in by_reason.items()
    ]
