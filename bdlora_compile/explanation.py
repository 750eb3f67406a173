"""What `explain` tells: a typed record that becomes text and JSON. All times in it are estimates.

The JSON is the dataclasses field by field; `Explanation.json_schema` describes it. ``version`` grows when a field
changes its meaning or goes away.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
from rich.console import Console

from bdlora_compile.errors import ConfigError
from bdlora_compile.factors import Layout
from bdlora_compile.ir import Origin
from bdlora_compile.machine import Machine
from bdlora_compile.nodes import AlikeLayers, NodeView
from bdlora_compile.strategy import Decision
from bdlora_compile.timing import Seconds, Workload

VERSION: Literal[2] = 2


@dataclass(frozen=True, slots=True)
class ExplainedRefusal:
    """A place where a pass did not apply, and why."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class ExplainedCollective:
    """One collective of a graph on one rank; bytes as `census.py` counts them.

    Attributes:
        kind, dtype, origin, site, layers: as of `census.Collective`.
        group_size: ranks that take part.
        shape: of the operand, an expression in ``batch`` and ``seq`` for each size.
        sizes: the same in numbers, for the explained batch; None where only a run can tell, as for bytes.
        payload, wire: bytes of one run as expressions.
        payload_bytes, wire_bytes: the same in numbers.
        wire_bytes_per_token: for one row of one token; None where the graph does not say which size the rows are.
        key: of its node.
        reason: why a pass that could have removed it did not; None if none could.
    """

    kind: str
    group_size: int
    shape: Sequence[str]
    sizes: Sequence[int | None]
    dtype: str
    origin: Origin
    layers: Sequence[str]
    site: str | None
    payload: str
    wire: str
    payload_bytes: int | None
    wire_bytes: int | None
    wire_bytes_per_token: int | None
    key: str = ""
    reason: str | None = None

    @property
    def runs(self) -> int:
        """How often it runs in one forward."""
        return max(len(self.layers), 1)


@dataclass(frozen=True, slots=True)
class ExplainedStage:
    """One pass over one graph.

    Attributes:
        name: the pass.
        seconds: of its rewrite and verification, measured.
        nodes_before, nodes_after: nodes of the graph, one layer standing for those that are like it.
        matches: places that it rewrote.
        refusals: places that it looked at and left.
        notes: counts by name.
        collectives: after it.
        text: the graph after it.
        nodes: the graph's nodes in order; of layers that are alike those of one.
        layers: which layer each one stands for.
    """

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    matches: int
    refusals: Sequence[ExplainedRefusal]
    notes: Mapping[str, int]
    collectives: Sequence[ExplainedCollective]
    text: str
    nodes: Sequence[NodeView] = ()
    layers: Sequence[AlikeLayers] = ()


@dataclass(frozen=True, slots=True)
class ExplainedGraph:
    """One graph of the model.

    Attributes:
        phase: "prefill" or "decode".
        batch, seq: the forward that numbers are for.
        inputs: types of the forward's own inputs, as captured.
        stages: passes in order.
        base_only: passes over the copy for batches without adapters.
    """

    phase: str
    batch: int
    seq: int
    inputs: Sequence[str]
    stages: Sequence[ExplainedStage]
    base_only: Sequence[ExplainedStage]

    def stage(self, name: str) -> ExplainedStage:
        """The stage of one pass."""
        return next(stage for stage in self.stages if stage.name == name)


@dataclass(frozen=True, slots=True)
class ExplainedSite:
    """A LoRA site, the same in all its layers, on the rank that holds most of it.

    Attributes:
        site: module path, ``*`` for the layer.
        layers: how many.
        role: "column" or "row".
        weight: [O, D] of the whole layer.
        local_weight: the same on one rank.
        copies: ranks that hold the same piece (fewer kv heads than ranks).
        layout: how its factors lie.
        ranks: adapter rank R of each adapter that has the site, once each.
        local_a, local_b: A and B of the first of them on a rank, blocks stacked: [r, D_loc/c] and [O_loc/c, r].
        weight_bytes: on a rank, in one layer.
        adapter_bytes: of one adapter on a rank, in one layer, a mean of the adapters.
        flops: multiplications and additions of the linear layer for one token on a rank, in one layer.
    """

    site: str
    layers: int
    role: str
    weight: tuple[int, int]
    local_weight: tuple[int, int]
    copies: int
    layout: Layout
    ranks: Sequence[int]
    local_a: tuple[int, int]
    local_b: tuple[int, int]
    weight_bytes: int
    adapter_bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class ExplainedEstimate:
    """Estimated time of one forward on the fullest rank; attributes as of `estimate.Estimate`."""

    phase: str
    strategy: str
    layouts: Mapping[str, Layout]
    projections: Seconds
    lora: Seconds
    attention: Seconds
    outside: Seconds
    seconds: float


@dataclass(frozen=True, slots=True)
class StepFormula:
    """Estimated seconds of one decode step with one strategy, as an expression; see `step_formula.py`.

    Attributes:
        strategy: "local", "slora" or "auto"; the layouts of the last are those chosen for the explained load.
        expression: in sympy's notation.
        javascript: the same expression, for a browser.
    """

    strategy: str
    expression: str
    javascript: str


@dataclass(frozen=True, slots=True)
class RankComparison:
    """What the ranks of a run have to say to each other's graphs.

    Attributes:
        rank: the one that wrote the record.
        size: ranks that compared.
        difference: the first difference to rank 0 that some rank found, None if all graphs are the same.
    """

    rank: int
    size: int
    difference: str | None


@dataclass(frozen=True, slots=True)
class GeneratedCode:
    """What Inductor made of one region of a graph: the part before the layers, a kind of layer, the part after them.

    Attributes:
        region: path of the first layer that it is for, "before layers", "after layers", or "graph".
        layers: all layers that it is run for.
        is_base_only: whether it is for batches without adapters.
        text: Python with the kernels in it, without folders of the machine.
        nodes: numbers of the lines (from 1) that name a node as their source, by the node's key; empty for a node that
            Inductor does not name.
    """

    region: str
    layers: Sequence[str]
    is_base_only: bool
    text: str
    nodes: Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the compiler does to a model on a number of ranks.

    `explain` fills all of it, without weights, GPUs or process groups. A run that was asked for reports fills what it
    knows: adapters, sites, estimates, formulas and the machine stay empty.

    Attributes:
        version: of this record.
        kind: "explained" by `explain`, "run" by a run, "foreign" by a run of a model that its owner sharded.
        name: what was asked for.
        model: class of the model.
        tp_size: N.
        num_layers: decoder layers.
        dtype: of weights, factors and activations.
        strategy: "local", "slora" or "auto".
        adapters: what adapters are explained, a line each.
        max_rank: largest rank that the bank admits.
        batch, prompt_length: the load that numbers are for.
        workload: the load of a decode step that layouts are chosen for.
        machine: the constants of the estimates.
        is_extrapolated: whether collectives over N ranks were not measured on it.
        weight_bytes: of all weights that a rank holds.
        adapter_bytes: of one adapter on a rank, a mean.
        decisions: why each group of sites has its layout.
        graphs: prefill and decode.
        sites: LoRA sites.
        estimates: of both phases with each strategy.
        formulas: of a decode step with each strategy.
        constants: names of the formulas' symbols with their values here.
        ranks: how the ranks of a run compare.
        code: what Inductor made of the regions of a run's graph.
        seconds: time that the explanation took, measured.
    """

    name: str
    model: str
    tp_size: int
    num_layers: int
    dtype: str
    strategy: str
    adapters: Sequence[str]
    max_rank: int
    batch: int
    prompt_length: int
    workload: Workload | None
    machine: Machine | None
    is_extrapolated: bool
    weight_bytes: int
    adapter_bytes: int
    decisions: Sequence[Decision]
    graphs: Sequence[ExplainedGraph]
    sites: Sequence[ExplainedSite]
    estimates: Sequence[ExplainedEstimate]
    seconds: float
    formulas: Sequence[StepFormula] = ()
    constants: Mapping[str, float] = field(default_factory=dict)
    ranks: RankComparison | None = None
    code: Sequence[GeneratedCode] = ()
    kind: Literal["explained", "run", "foreign"] = "explained"
    version: Literal[2] = VERSION

    def graph(self, phase: str) -> ExplainedGraph:
        """The graph of "prefill" or "decode"."""
        return next(graph for graph in self.graphs if graph.phase == phase)

    def text(self, width: int = 140) -> str:
        """The explanation as a text of tables."""
        from bdlora_compile.explanation_text import show  # a record does not depend on how it is shown

        file = io.StringIO()
        show(self, Console(file=file, width=width))
        return file.getvalue()

    def html(self) -> str:
        """The explanation as one page that needs no network and no server."""
        from bdlora_compile.inspector.page import render  # the same

        return render([self])

    def to_json(self) -> str:
        """The whole record; see `json_schema`."""
        return pydantic.TypeAdapter(Explanation).dump_json(self, indent=1).decode() + "\n"

    @staticmethod
    def from_json(text: str) -> "Explanation":
        """Read what `to_json` wrote."""
        return pydantic.TypeAdapter(Explanation).validate_json(text)

    @staticmethod
    def read(path: Path) -> "Explanation":
        """Read a file that `to_json` wrote.

        Raises:
            ConfigError: there is no such file, or it is not one of this version.
        """
        try:
            return Explanation.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            found = getattr(error, "strerror", None) or "a file that is no text"
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            found = f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
        raise ConfigError(
            str(path),
            found=found,
            expected=f"a record of version {VERSION}",
            remedy="write it with `bdlora explain --json`, or with options={'report': ...}",
        )

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """JSON schema of the record."""
        return pydantic.TypeAdapter(Explanation).json_schema()
