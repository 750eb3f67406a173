"""The backend that ``torch.compile(model, backend="bdlora")`` finds through its entry point."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import torch
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from bdlora_compile.collectives import ordered_list
from bdlora_compile.errors import ConfigError, HollowError
from bdlora_compile.hollow import tag_of
from bdlora_compile.ir import CacheSource, Captured, InputSource, fake_value, placeholders, record
from bdlora_compile.pass_manager import PassContext, run_passes
from bdlora_compile.pipeline import PIPELINE
from bdlora_compile.printer import type_text
from bdlora_compile.report import Report
from bdlora_compile.runtime.agreement import require_equal
from bdlora_compile.runtime.deployment import Deployment
from bdlora_compile.runtime.lockstep import LockStepProgram
from bdlora_compile.runtime.program import BoundGraph, CallSource, Program, bind

_LOG = logging.getLogger(__name__)

Inner = Literal["eager", "inductor"]


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """What ``options={...}`` may hold.

    Attributes:
        inner: what runs one rank's graph: "inductor" (the default on CUDA) or "eager" (the default elsewhere).
    """

    inner: Inner | None = None

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
            if value not in (None, "eager", "inductor"):
                raise ConfigError(
                    f"options[{name!r}]",
                    found=repr(value),
                    expected="'eager' or 'inductor'",
                    remedy="choose one of them",
                )
        return cls(**(options or {}))  # type: ignore[arg-type]  # checked above


def bdlora(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured into this rank's part of it.

    Raises:
        ConfigError: an option or ``mode`` cannot be honoured.
        HollowError: the model was not loaded or attached.
        PlacementError: strict mode, and a value cannot stay on its rank.
        AgreementError: ranks compiled different graphs.
    """
    chosen = CompileOptions.parse(options)
    if mode not in (None, "default"):
        raise ConfigError(f"mode={mode!r}", found="a mode", expected="none", remedy="use options={'inner': ...}")
    deployment = _deployment_of(module)
    captured = _copy(module)
    report = _new_report(captured, deployment)
    run_passes(PIPELINE, captured, PassContext(deployment.plan, deployment.strict), report)
    deployment.reports.append(report)
    for refusal in report.stage("partition").stats.refusals:
        _LOG.warning("gather that nobody asked for: %s, because %s", refusal.where, refusal.reason)
    require_equal(deployment.agreement, f"collectives of graph {len(deployment.reports)}", ordered_list(captured.graph))
    return _emit(captured, example_inputs, deployment, chosen)


def _copy(module: GraphModule) -> Captured:
    """A graph of our own: Dynamo goes on reading the one that it captured."""
    graph = Graph()
    output = graph.graph_copy(module.graph, {})
    graph.output(output)
    return Captured(GraphModule(module, graph))


def _emit(
    captured: Captured, example_inputs: Sequence[Any], deployment: Deployment, options: CompileOptions
) -> Callable[..., Any]:
    """Read this rank's slices, bind them, and compile what is left."""
    plan = deployment.plan
    records = [record(node) for node in placeholders(captured.graph)]
    token_index = _token_index(captured)
    bound = [bind(records, state, plan.mesh, plan.device) for state in deployment.ranks]
    if deployment.is_lockstep:
        graphs = [BoundGraph(captured.module.forward, values) for values in bound]
        return LockStepProgram(deployment, captured.graph, graphs, token_index)
    inner = options.inner or ("inductor" if plan.device.type == "cuda" else "eager")
    run = captured.module.forward if inner == "eager" else _inductor(captured, bound[0], example_inputs)
    return Program(deployment, BoundGraph(run, bound[0]), token_index)


def _token_index(captured: Captured) -> int:
    assert captured.token_input is not None, "the tag pass finds the token input"
    source = record(captured.token_input).source
    assert isinstance(source, InputSource), "the token input is an argument"
    return source.index


def _inductor(
    captured: Captured, values: Sequence[torch.Tensor | CallSource], example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    """Compile with Inductor; constants enter as fakes of fixed shape, arguments as Dynamo gave them."""
    from torch._inductor.compile_fx import compile_fx  # importing Inductor takes seconds

    context = TracingContext.get()
    mode = context.fake_mode
    assert mode is not None, "Dynamo traces under a fake mode"
    inputs = [
        _example_input(value, node, example_inputs, mode)
        for value, node in zip(values, placeholders(captured.graph), strict=True)
    ]
    compiled: Any = compile_fx(captured.module, inputs)
    return cast(Callable[..., Any], compiled)


def _example_input(
    value: torch.Tensor | CallSource, node: Node, example_inputs: Sequence[Any], mode: FakeTensorMode
) -> Any:
    match value:
        case InputSource(index):
            return example_inputs[index]
        case CacheSource():
            return fake_value(node)
        case _:
            return mode.from_tensor(value, static_shapes=True)


def _new_report(captured: Captured, deployment: Deployment) -> Report:
    nodes = placeholders(captured.graph)
    own = [node for node in nodes if tag_of(_example(node)) is None and isinstance(fake_value(node), torch.Tensor)]
    return Report(deployment.plan.model, deployment.plan.mesh.size, [type_text(fake_value(node)) for node in own])


def _deployment_of(module: GraphModule) -> Deployment:
    """The deployment that the graph's hollow parameters belong to."""
    for node in placeholders(module.graph):
        tag = tag_of(_example(node))
        if tag is not None:
            return tag.deployment
    raise HollowError(
        "model compiled with backend='bdlora'",
        found="a model that was neither loaded nor attached",
        expected="a model from `bdlora_compile.load(...)` or `bdlora_compile.attach(model)`",
        remedy="call `model, adapters = bdlora_compile.attach(model)` before compiling",
    )


def _example(node: Any) -> object:
    return node.meta["grapharg"].example if "grapharg" in node.meta else None
