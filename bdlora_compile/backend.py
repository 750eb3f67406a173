"""The backend that ``torch.compile(model, backend="bdlora")`` finds through its entry point."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.fx import GraphModule

from bdlora_compile.attention import attention_text
from bdlora_compile.collectives import ordered_list
from bdlora_compile.errors import ConfigError, HollowError
from bdlora_compile.foreign.capture import example_of, is_foreign
from bdlora_compile.foreign.compile import compile_foreign
from bdlora_compile.fused_paths import fuse_paths
from bdlora_compile.fused_rotary import fuse_rotary
from bdlora_compile.generated_code import CodeOfRegion, code_of
from bdlora_compile.hollow import tag_of
from bdlora_compile.inductor import compile_region
from bdlora_compile.ir import Captured, InputSource, fake_value, placeholders, record
from bdlora_compile.mutation import argument_indices, buffer_arguments, mutated_arguments
from bdlora_compile.node_names import symbol_names
from bdlora_compile.pass_manager import PassContext, run_passes
from bdlora_compile.pipeline import BASE_ONLY, PIPELINE
from bdlora_compile.printer import dtype_text, type_text
from bdlora_compile.regions import Regions, split
from bdlora_compile.report import Report
from bdlora_compile.run_report import WrittenReport, trace_stages, write_report
from bdlora_compile.runtime.agreement import require_equal
from bdlora_compile.runtime.deployment import Deployment
from bdlora_compile.runtime.lockstep import LockStepProgram, LockStepRegion
from bdlora_compile.runtime.ops import has_kernels
from bdlora_compile.runtime.program import BoundRegion, Program, Variants, bind
from bdlora_compile.runtime.ranges import RangedModule, in_range
from bdlora_compile.runtime.step_graphs import CudaRecorder, StepGraphs
from bdlora_compile.transport import through_symmetric_memory
from bdlora_compile.unfold import unfold

_LOG = logging.getLogger(__name__)

Inner = Literal["eager", "inductor"]


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """What ``options={...}`` may hold.

    Attributes:
        inner: what runs one rank's graph: "inductor" (the default on CUDA) or "eager" (the default elsewhere).
        on_report: called with the report of each graph once the passes have run.
        report: a folder into which every rank writes a record and a page of each graph.
        nvtx: whether profilers see a range for each node (with "inductor": for each layer), named by its key.
        cuda_graphs: record forwards as CUDA graphs (on CUDA the default); also ``mode="reduce-overhead"``.
    """

    inner: Inner | None = None
    on_report: Callable[[Report], None] | None = None
    report: str | Path | None = None
    nvtx: bool = False
    cuda_graphs: bool | None = None

    @classmethod
    def parse(cls, options: Mapping[str, object] | None) -> "CompileOptions":
        """Check a dictionary of options.

        Raises:
            ConfigError: an option is unknown or has a value that is.
        """
        known = [option.name for option in fields(cls)]
        for name, value in (options or {}).items():
            if name not in known:
                raise ConfigError(
                    f"options[{name!r}]",
                    found="an unknown option",
                    expected=f"one of {', '.join(known)}",
                    remedy="leave it out",
                )
            expected = _unlike(name, value)
            if expected:
                raise ConfigError(
                    f"options[{name!r}]", found=repr(value), expected=expected, remedy="choose one of them"
                )
        return cls(**(options or {}))  # type: ignore[arg-type]  # checked above


def _unlike(name: str, value: object) -> str:
    """What an option should have been; empty if it is that."""
    if value is None:
        return ""
    if name == "on_report":
        return "" if callable(value) else "a function of a report"
    if name == "report":
        return "" if isinstance(value, (str, Path)) else "the path of a folder"
    if name in ("cuda_graphs", "nvtx"):
        return "" if isinstance(value, bool) else "True or False"
    return "" if value in ("eager", "inductor") else "'eager' or 'inductor'"


def bdlora(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured into this rank's part of it.

    A graph of a model that its owner has sharded already (collectives, DTensors or declared factors in it) is this
    rank's part as it is: its LoRA collectives are removed where that is licensed (see `foreign/`).

    Raises:
        ConfigError: an option or ``mode`` cannot be honoured.
        HollowError: the model was not loaded or attached.
        StandInError: a layer cannot stand in for another after all; see `StandIns.run`.
        PlacementError: strict mode, and a value cannot stay on its rank.
        AgreementError: ranks compiled different graphs.
    """
    chosen = CompileOptions.parse(options)
    if mode not in (None, "default", "reduce-overhead"):
        raise ConfigError(
            f"mode={mode!r}",
            found="a mode that means nothing here",
            expected="'default' or 'reduce-overhead'",
            remedy="use options={'inner': ..., 'cuda_graphs': ...}",
        )
    if mode == "reduce-overhead":
        chosen = replace(chosen, cuda_graphs=True)
    if is_foreign(module):
        return compile_foreign(module, example_inputs, chosen)
    deployment = _deployment_of(module)
    analysed = analyse(module, deployment, has_views=chosen.report is not None or chosen.nvtx)
    captured, base_only, report = analysed.captured, analysed.base_only, analysed.report
    if chosen.on_report is not None:
        chosen.on_report(report)
    trace_stages(report)
    written = _write_report(Path(chosen.report), captured, report, deployment) if chosen.report is not None else None
    for refusal in report.stage("partition").stats.refusals:
        _LOG.warning("gather that nobody asked for: %s, because %s", refusal.where, refusal.reason)
    lists = "\nbase only\n".join(ordered_list(variant) for variant in (captured, base_only))
    require_equal(deployment.agreement, f"collectives of graph {len(deployment.reports)}", lists)
    start = time.perf_counter()
    code: list[CodeOfRegion] | None = None if written is None else []
    program = _emit(captured, base_only, deployment, chosen, report, code)
    report.emit_seconds = time.perf_counter() - start
    if written is not None:
        written.add_code([one.record() for one in code or () if one.texts])
    return program


def _write_report(folder: Path, captured: Captured, report: Report, deployment: Deployment) -> WrittenReport:
    tokens = fake_value(captured.token_input) if captured.token_input is not None else None
    is_decode = isinstance(tokens, torch.Tensor) and isinstance(tokens.shape[1], int) and tokens.shape[1] == 1
    return write_report(
        folder,
        report,
        deployment.agreement,
        deployment.ranks[0].rank,
        kind="run",
        phase="decode" if is_decode else "prefill",
        dtype=dtype_text(deployment.plan.dtype),
    )


@dataclass(frozen=True, slots=True)
class Analysed:
    """A graph after all passes, before anything is read, bound or compiled.

    Attributes:
        captured: for batches in which some row has an adapter.
        base_only: for the others.
        report: what the passes did.
    """

    captured: Captured
    base_only: Captured
    report: Report


def analyse(module: GraphModule, deployment: Deployment, *, has_views: bool = False) -> Analysed:
    """Run all passes over a graph that Dynamo captured; the report joins those of the deployment.

    Args:
        has_views: whether the report keeps each stage's nodes for the inspector.

    Raises:
        PlacementError: strict mode, and a value cannot stay on its rank.
    """
    captured = _copy(module)
    tracing = unfold(captured, deployment.stand_ins)
    report = _new_report(captured, deployment)
    report.tracing = tracing
    context = PassContext(deployment.plan, deployment.strict, has_views=has_views)
    run_passes(PIPELINE, captured, context, report.stages)
    report.symbols = symbol_names(captured)
    report.all_reduce = deployment.ranks[0].all_reduce.text if deployment.ranks else ""
    report.attention = attention_text(captured, deployment.plan.device)
    base_only = captured.copy()
    run_passes(BASE_ONLY, base_only, context, report.base_only)
    deployment.reports.append(report)
    return Analysed(captured, base_only, report)


def _copy(module: GraphModule) -> Captured:
    """A graph of our own: Dynamo goes on reading the one that it captured."""
    return Captured(module, module.graph).copy()


def _emit(
    captured: Captured,
    base_only: Captured,
    deployment: Deployment,
    options: CompileOptions,
    report: Report,
    code: list[CodeOfRegion] | None,
) -> Program | LockStepProgram:
    """Read this rank's slices, bind them, and compile what is left; ``code`` collects what Inductor makes of it."""
    token_index = _token_index(captured)
    first = deployment.ranks[0]
    for name, variant in {"with adapters": captured, "base only": base_only}.items():
        stats = through_symmetric_memory(variant, first.all_reduce, deployment.plan.mesh, first.rank)
        if stats is not None:
            report.norms[name] = stats
        if deployment.plan.is_for_gpus:
            rotary = fuse_rotary(variant.graph)
            if rotary.matches or rotary.refusals:
                report.rotary[name] = rotary
    if deployment.plan.is_for_gpus:
        paths = fuse_paths(captured)
        report.paths = paths if paths.notes["paths"] else None
    variants = [split(variant) for variant in (captured, base_only)]
    if deployment.is_lockstep:
        with_lora, without = [_bind_all_ranks(regions, deployment) for regions in variants]
        return LockStepProgram(deployment, with_lora, without, token_index)
    inner = options.inner or ("inductor" if deployment.plan.device.type == "cuda" else "eager")
    bound = (
        _bind_and_compile(regions, deployment, inner, options.nvtx, own)
        for regions, own in zip(variants, _listeners(variants, code), strict=True)
    )
    # A recorded step is replayed without the ranges.
    is_recorded = False if options.nvtx and options.cuda_graphs is None else options.cuda_graphs
    steps = _step_graphs(captured, deployment, is_recorded)
    if steps is not None:
        report.step_graphs = steps.stats
        deployment.step_graphs.add(steps)
    return Program(deployment, Variants(*bound), token_index, steps)


def _step_graphs(captured: Captured, deployment: Deployment, wanted: bool | None) -> StepGraphs | None:
    is_cuda = deployment.plan.device.type == "cuda"
    if wanted and not is_cuda:
        raise ConfigError(
            "options['cuda_graphs']",
            found=f"a model on {deployment.plan.device.type}",
            expected="a model on CUDA",
            remedy="leave the option (or mode='reduce-overhead') out",
        )
    if not is_cuda or wanted is False:
        return None
    in_place = mutated_arguments(captured) | buffer_arguments(captured)
    steps = StepGraphs(argument_indices(captured), in_place, CudaRecorder)
    dtype = deployment.plan.dtype
    if not has_kernels(dtype):
        # The variant of forwards in which some row has an adapter.
        steps.refuse(True, f"forwards with adapters: LoRA in {dtype} has no kernels, and what stands in asks the GPU")
    return steps


def _bind_all_ranks(regions: Regions, deployment: Deployment) -> list[LockStepRegion]:
    return [
        LockStepRegion(
            regions.modules[step.region].graph,
            [bind(regions.sources(step), regions.placements(step), rank, deployment.plan) for rank in deployment.ranks],
        )
        for step in regions.steps
    ]


def _listeners(variants: Sequence[Regions], code: list[CodeOfRegion] | None) -> list[list[CodeOfRegion] | None]:
    """For each variant what collects the code of its regions; nothing where nobody asked for reports."""
    if code is None:
        return [None] * len(variants)
    found = [code_of(regions, is_base_only=at > 0) for at, regions in enumerate(variants)]
    code += [one for own in found for one in own]
    return [*found]


def _bind_and_compile(
    regions: Regions, deployment: Deployment, inner: Inner, is_ranged: bool, code: Sequence[CodeOfRegion] | None
) -> list[BoundRegion]:
    """This rank's values for every step; each region is compiled once, with those of its first step."""
    (state,) = deployment.ranks
    compiled: dict[int, Callable[..., Any]] = {}
    bound = []
    for step in regions.steps:
        values = bind(regions.sources(step), regions.placements(step), state, deployment.plan)
        module = regions.modules[step.region]
        if step.region not in compiled:
            eager = RangedModule(module) if is_ranged else module.forward
            on_code = code[step.region].texts.append if code is not None else None
            compiled[step.region] = eager if inner == "eager" else compile_region(module, values, on_code)
        run = compiled[step.region]
        bound.append(BoundRegion(in_range(regions.label(step), run) if is_ranged else run, values))
    return bound


def _token_index(captured: Captured) -> int:
    assert captured.token_input is not None, "the tag pass finds the token input"
    source = record(captured.token_input).source
    assert isinstance(source, InputSource), "the token input is an argument"
    return source.index


def _new_report(captured: Captured, deployment: Deployment) -> Report:
    nodes = placeholders(captured.graph)
    own = [node for node in nodes if tag_of(example_of(node)) is None and isinstance(fake_value(node), torch.Tensor)]
    plan = deployment.plan
    inputs = [type_text(fake_value(node)) for node in own]
    return Report(plan.model, plan.mesh.size, inputs, decisions=plan.decisions)


def _deployment_of(module: GraphModule) -> Deployment:
    """The deployment that the graph's hollow parameters belong to."""
    for node in placeholders(module.graph):
        tag = tag_of(example_of(node))
        if tag is not None:
            return tag.deployment
    raise HollowError(
        "model compiled with backend='bdlora'",
        found="a model that was neither loaded nor attached",
        expected="a model from `bdlora_compile.load(...)` or `bdlora_compile.attach(model)`",
        remedy="call `model, adapters = bdlora_compile.attach(model)` before compiling",
    )
