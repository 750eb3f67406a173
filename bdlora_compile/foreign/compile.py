"""The backend for graphs that others sharded: passes, licences, rebuilt factors, and a program that watches them."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any, Protocol

import torch
from torch.fx import GraphModule

from bdlora_compile.collectives import group_named, ordered_list
from bdlora_compile.foreign.capture import ForeignGraph, Runnable, capture_through_aot
from bdlora_compile.foreign.licences import refused_paths
from bdlora_compile.foreign.paths import GroupMember, Path
from bdlora_compile.generated_code import CodeOfRegion
from bdlora_compile.ir import ArgumentWeight, InputSource, RebuiltSource, fake_tensor, fake_value, placeholders, record
from bdlora_compile.node_names import symbol_names
from bdlora_compile.pass_manager import PassContext, run_passes
from bdlora_compile.passes.fold import Fold
from bdlora_compile.passes.localize_declared import LocalizeDeclared
from bdlora_compile.passes.simplify import Simplify
from bdlora_compile.passes.split_products import SplitProducts
from bdlora_compile.passes.tag_paths import TagPaths
from bdlora_compile.placement import Mesh
from bdlora_compile.plan import ModelPlan
from bdlora_compile.printer import type_text
from bdlora_compile.report import Report
from bdlora_compile.run_report import trace_stages, write_report
from bdlora_compile.runtime.agreement import Agreement, agreement_of, require_equal
from bdlora_compile.runtime.foreign_program import ForeignProgram, rebuild, rebuilt_sources
from bdlora_compile.runtime.ranges import RangedModule

_LOG = logging.getLogger(__name__)


class Options(Protocol):
    """What of `backend.CompileOptions` counts here."""

    @property
    def inner(self) -> str | None: ...
    @property
    def on_report(self) -> Callable[[Report], None] | None: ...
    @property
    def report(self) -> str | FilePath | None: ...
    @property
    def nvtx(self) -> bool: ...


def compile_foreign(module: GraphModule, example_inputs: Sequence[Any], options: Options) -> Runnable:
    """Compile a graph of a model that others sharded.

    Raises:
        ConfigError: gradients are wanted.
        AgreementError: ranks have different graphs.
    """

    def compile_graph(foreign: ForeignGraph, fakes: Sequence[Any]) -> Runnable:
        agreement = agreement_of([group_named(name) for name in foreign.groups])
        report = localize(foreign, agreement, has_views=options.report is not None or options.nvtx)
        if options.on_report is not None:
            options.on_report(report)
        trace_stages(report)
        written = None
        if options.report is not None:
            rank = max(foreign.groups.values(), key=lambda member: member.size, default=GroupMember(0, 1)).rank
            folder = FilePath(options.report)
            written = write_report(folder, report, agreement, rank, kind="foreign", phase="forward")
        for stage in report.stages:
            for refusal in stage.stats.refusals:
                _LOG.warning("LoRA path left as it is: %s, because %s", refusal.where, refusal.reason)
        require_equal(agreement, "collectives of a graph", ordered_list(foreign.captured))
        code = CodeOfRegion.of(foreign.captured.graph, "graph")
        program = _emit(foreign, fakes, options, code.texts.append if written is not None else None)
        if written is not None and code.texts:
            written.add_code([code.record()])
        return program

    return capture_through_aot(module, example_inputs, compile_graph)


def localize(foreign: ForeignGraph, agreement: Agreement, *, has_views: bool = False) -> Report:
    """Run the passes in place, and say what they did.

    Args:
        foreign: the graph.
        agreement: of the ranks that share it.
        has_views: whether the report keeps each stage's nodes for the inspector.
    """
    captured = foreign.captured
    sizes = [member.size for member in foreign.groups.values()]
    context = PassContext(_plan(max(sizes, default=1)), strict=False, has_views=has_views)
    report = Report("a model sharded by its owner", context.plan.mesh.size, _inputs(foreign))
    found: list[Path] = []
    run_passes((Simplify(), SplitProducts(), TagPaths(foreign.groups, found)), captured, context, report.stages)
    refused = refused_paths(captured.graph, found, foreign.tensors, foreign.has_dtensors, agreement)
    run_passes((LocalizeDeclared(found, refused), Fold()), captured, context, report.stages)
    report.symbols = symbol_names(captured)
    report.rebuilt = _rebuilt_bytes(foreign)
    return report


def _emit(
    foreign: ForeignGraph, fakes: Sequence[Any], options: Options, on_code: Callable[[str], None] | None
) -> Runnable:
    captured = foreign.captured
    sources = rebuilt_sources(captured.graph)
    factors = rebuild(sources, foreign.tensors)
    module = GraphModule(captured.module, captured.graph)
    is_cuda = any(tensor.is_cuda for tensor in foreign.tensors.values())
    run: Runnable = RangedModule(module) if options.nvtx else module.forward
    if (options.inner or ("inductor" if is_cuda else "eager")) == "inductor":
        from bdlora_compile.inductor import compile_flat  # importing Inductor takes seconds

        run = compile_flat(module, [*fakes, *factors], on_code)
    return ForeignProgram(run, factors, watched_parameters(foreign))


def watched_parameters(foreign: ForeignGraph) -> list[tuple[int, str, torch.Tensor]]:
    """(index, name, tensor) of the parameters on whose values the rewritten graph rests."""
    watched = {source.index: source.parameter for source in rebuilt_sources(foreign.captured.graph)}
    for node in placeholders(foreign.captured.graph):
        source = record(node).source
        if isinstance(source, ArgumentWeight) and source.declared is not None:
            watched[source.index] = source.parameter
    return [(index, name, foreign.tensors[index]) for index, name in sorted(watched.items())]


def _rebuilt_bytes(foreign: ForeignGraph) -> dict[str, int]:
    nodes = placeholders(foreign.captured.graph)
    factors = [(source, node) for node in nodes if isinstance(source := record(node).source, RebuiltSource)]
    return {source.parameter: fake_tensor(node).nbytes for source, node in factors}


def _inputs(foreign: ForeignGraph) -> list[str]:
    nodes = placeholders(foreign.captured.graph)
    own = [node for node in nodes if isinstance(record(node).source, InputSource)]
    return [type_text(fake_value(node)) for node in own if isinstance(fake_value(node), torch.Tensor)]


def _plan(size: int) -> ModelPlan:
    """A plan of nothing: in such a graph everything is placed already."""
    nothing: dict[str, Any] = {}
    return ModelPlan("", Mesh(size), nothing, nothing, nothing, frozenset(), 0, 0, torch.float32, torch.device("cpu"))
