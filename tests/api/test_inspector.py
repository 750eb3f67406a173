"""The record, its schema, its text and page; comparison of records; what a run writes down."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import sympy
import torch
from torch._logging._internal import LazyTraceHandler, TorchLogsFormatter, trace_log
from typer.testing import CliRunner

import bdlora_compile as bd
from bdlora_compile.cli import app
from bdlora_compile.comparing import Forbidden, compare
from bdlora_compile.explanation import VERSION, StepFormula
from bdlora_compile.ir import Origin, set_node_key
from bdlora_compile.nodes import source_line
from bdlora_compile.run_report import write_report
from bdlora_compile.runtime import ranges
from bdlora_compile.runtime.agreement import Alone
from bdlora_compile.strategy import Strategy
from tests.conftest import GoldenCheck
from tests.models import AdapterSpec, ModelSpec, save_adapter, save_model

ROOT = Path(__file__).parents[2]
SPEC = ModelSpec(heads=8, kv_heads=4, layers=2, vocabulary=128)
_Records = dict[str, bd.Explanation]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> _Records:
    """Explanations of one small model, and of one with fewer kv heads than ranks and a mixed bank."""
    folder = tmp_path_factory.mktemp("inspector")
    model = save_model(SPEC, folder / "model")
    narrow = save_model(replace(SPEC, kv_heads=2), folder / "narrow")
    adapters = {
        "plain": save_adapter(AdapterSpec(rank=6), narrow, folder / "plain"),
        "blocks": save_adapter(AdapterSpec(rank=8, nblocks=4), narrow, folder / "blocks"),
    }
    load = bd.Load(4, 8, 2)
    torch._dynamo.reset()

    def told(strategy: Strategy) -> bd.Explanation:
        return bd.explain(model, tp_size=4, adapter_rank=8, nblocks=4, strategy=strategy, load=load)

    found = {"local": told("local"), "slora": told("slora")}
    found["mixed_bank_few_kv_heads"] = bd.explain(narrow, adapters=adapters, tp_size=4, load=load)
    # No folder of this machine, and no times: both differ from run to run.
    return {name: timeless(replace(one, name="model")) for name, one in found.items()}


def timeless(told: bd.Explanation) -> bd.Explanation:
    """The record without measured times."""
    graphs = [
        replace(
            graph,
            stages=[replace(stage, seconds=0.0) for stage in graph.stages],
            base_only=[replace(stage, seconds=0.0) for stage in graph.base_only],
        )
        for graph in told.graphs
    ]
    return replace(told, graphs=graphs, seconds=0.0)


@pytest.mark.parametrize("name", ["local", "slora", "mixed_bank_few_kv_heads"])
def test_texts(records: _Records, name: str, golden: GoldenCheck) -> None:
    """The whole text report."""
    golden(f"explained_{name}", records[name].text(width=150))


def test_text_of_refused_sites(monkeypatch: pytest.MonkeyPatch, golden: GoldenCheck) -> None:
    """A plan that contradicts the graph: served by gathers, each with its reason, only where that is asked for."""
    config = SPEC.config()
    plan = {**config.base_model_tp_plan, "layers.*.self_attn.o_proj": "colwise"}
    monkeypatch.setattr(type(config), "base_model_tp_plan", plan)
    with pytest.raises(bd.PlacementError, match="o_proj: found the plan has it as a column layer"):
        bd.explain(config, tp_size=2, adapter_rank=4)
    told = timeless(bd.explain(config, tp_size=2, adapter_rank=4, load=bd.Load(4, 8, 2), strict=False))
    for graph in told.graphs:
        assert any(one.origin is Origin.FALLBACK for one in graph.stages[-1].collectives)
    golden("explained_refused_site", told.text(width=150))


def test_the_published_schema_is_that_of_the_record(records: _Records) -> None:
    """Another version has another file; records are valid by it, and others are not."""
    path = ROOT / "docs" / f"explanation.v{VERSION}.schema.json"
    published = json.loads(path.read_text())
    assert undescribed(published) == undescribed(bd.Explanation.json_schema()), "write it again: make schema"
    validator = jsonschema.Draft202012Validator(published)
    record = json.loads(records["slora"].to_json())
    validator.validate(record)
    assert bd.Explanation.from_json(records["slora"].to_json()).text() == records["slora"].text()
    assert list(validator.iter_errors({**record, "version": VERSION + 1}))
    assert list(validator.iter_errors({**record, "graphs": None}))


def undescribed(schema: Any) -> Any:
    """The schema without prose."""
    if isinstance(schema, dict):
        return {key: undescribed(value) for key, value in schema.items() if key != "description"}
    return [undescribed(value) for value in schema] if isinstance(schema, list) else schema


def test_nodes_keep_their_keys_through_the_stages(records: _Records) -> None:
    """Of the compiled graph's nodes those of the model's own code have the key they were captured with."""
    graph = records["local"].graph("decode")
    first, last = ({node.key: node for node in stage.nodes} for stage in (graph.stages[0], graph.stages[-1]))
    kept = [key for key, node in last.items() if node.file and not node.stage]
    assert len(kept) > 50
    assert [key for key in kept if key not in first] == []
    linear = last["model.layers.0.self_attn.o_proj/linear"]
    assert linear.file.startswith("transformers/models/llama/modeling_llama.py:")
    assert "self.o_proj(" in linear.code
    assert (linear.kind, linear.layer, linear.placement) == ("product", "model.layers.0", "P")
    both = ["model.layers.0", "model.layers.1"]
    for stage in (*graph.stages, *graph.base_only):
        # The cache counts its tokens after its last layer: that makes the last layer no other kind, and is not hidden.
        assert [one.layers for one in stage.layers] == [both], stage.name
        counting = [node for node in stage.nodes if node.key == "model.layers.1.self_attn/add_"]
        assert [node.layer for node in counting] == [None], stage.name
    assert {node.kind for node in graph.stage("partition").nodes} >= {"collective", "lora-a", "lora-b", "product"}
    assert {node.kind for node in graph.stages[-1].nodes} >= {"collective", "lora", "attention", "input", "output"}


def test_every_collective_names_its_node_and_says_why_it_stays(records: _Records) -> None:
    """Four LoRA collectives a layer stay with strategy="slora", each with the reason; none with "local"."""
    for name, count in (("local", 0), ("slora", 4)):
        stage = records[name].graph("decode").stages[-1]
        keys = {node.key for node in stage.nodes if node.kind == "collective"}
        assert [one.key for one in stage.collectives if one.key not in keys] == []
        lora = [one for one in stage.collectives if one.origin is Origin.LORA]
        assert len(lora) == count
        assert all(one.reason and "strategy='slora'" in one.reason for one in lora)
        assert all(one.reason is None for one in stage.collectives if one.origin is Origin.BASE)


@pytest.mark.parametrize("name", ["local", "slora", "mixed_bank_few_kv_heads"])
def test_the_formulas_are_the_estimates(records: _Records, name: str) -> None:
    """At the explained load each expression is the estimate of the decode step: the same sum, so to rounding."""
    told = records[name]
    estimates = {one.strategy: one.seconds for one in told.estimates if one.phase == "decode"}
    assert [one.strategy for one in told.formulas] == ["local", "slora", "auto"]
    for one in told.formulas:
        value = float(sympy.sympify(one.expression).subs(told.constants))
        assert value == pytest.approx(estimates[one.strategy], rel=1e-9)
        twice = float(sympy.sympify(one.expression).subs({**told.constants, "W_mem": 1e9}))
        assert twice > 1.01 * value


def test_the_page_takes_nothing_over_unescaped(records: _Records) -> None:
    """Names are text; a formula of a file that holds more than arithmetic is refused."""
    hostile = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
    page = replace(records["local"], name=hostile, adapters=[hostile]).html()
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    for javascript in ("fetch('x')", "alert(1)", "T + `x`", "constructor", "(() => 1)()", "T=>T", "T;T", 'T+"a"'):
        formula = StepFormula("local", "T", javascript)
        with pytest.raises(bd.ConfigError, match="arithmetic"):
            replace(records["local"], formulas=[formula]).html()
    with pytest.raises(bd.ConfigError, match="arithmetic"):
        replace(records["local"], constants={"T=alert(1)": 1.0}).html()
    words = dict.fromkeys(("script", "img", "src", "x", "onerror", "alert"), 1.0)
    injected = StepFormula("local", "T", "1</script><img src=x onerror=alert(1) >")
    with pytest.raises(bd.ConfigError, match="arithmetic"):
        replace(records["local"], constants=words, formulas=[injected]).html()


def test_comparison(records: _Records) -> None:
    """What CI may forbid, each with a pair that has it and one that has not."""
    local, slora = records["local"], records["slora"]
    every = list(Forbidden)
    same = compare(local, local, every)
    assert same.is_same
    assert same.violations == []
    better = compare(slora, local, every)
    assert not better.is_same
    assert better.violations == []
    worse = compare(local, slora, [Forbidden.NEW_COLLECTIVE])
    # Four groups of sites in two phases.
    assert len(worse.violations) == 8
    assert all("LoRA" in text and "0 -> 2" in text for text in worse.violations)
    assert len(compare(slora, slora, [Forbidden.LORA_COLLECTIVE]).violations) == 8
    assert compare(slora, slora, [Forbidden.GATHER_FALLBACK, Forbidden.NEW_COLLECTIVE]).violations == []
    stage = slora.graphs[0].stages[-1]
    gathered = replace(stage, collectives=[replace(stage.collectives[0], origin=Origin.FALLBACK)])
    graph = replace(slora.graphs[0], stages=[*slora.graphs[0].stages[:-1], gathered])
    assert len(compare(slora, replace(slora, graphs=[graph]), [Forbidden.GATHER_FALLBACK]).violations) == 1
    missing = compare(replace(slora, graphs=slora.graphs[:1]), slora, [Forbidden.NEW_COLLECTIVE])
    assert missing.violations == ["decode of the second: no graph to compare with"]


def test_diff_command(records: _Records, tmp_path: Path) -> None:
    """Text, page and exit status."""
    for name in ("local", "slora"):
        (tmp_path / f"{name}.json").write_text(records[name].to_json())
    files = [str(tmp_path / "local.json"), str(tmp_path / "slora.json")]
    runner = CliRunner()
    plain = runner.invoke(app, ["diff", *files, "--html", str(tmp_path / "diff.html")])
    assert plain.exit_code == 0, plain.output
    assert "LoRA all_reduce f32[batch, 8] of 4 at self_attn.o_proj" in plain.output
    assert "nodes of decode" in plain.output
    assert "<title>local against slora" in (tmp_path / "diff.html").read_text()
    written = ["--json", str(tmp_path / "diff.json")]
    failing = runner.invoke(app, ["diff", *files, "--only", "comm", "--fail-on", "new-collective", *written])
    assert len(json.loads((tmp_path / "diff.json").read_text())["violations"]) == 8
    assert failing.exit_code == 1
    assert "forbidden: decode, with adapters: new LoRA all_reduce" in failing.output
    assert "nodes of decode" not in failing.output
    assert runner.invoke(app, ["diff", files[1], files[0], "--fail-on", "lora-collective"]).exit_code == 0
    (tmp_path / "old.json").write_text('{"version": 1}')
    for bad, said in (("old.json", "a record of version 2"), ("none.json", "No such file")):
        result = runner.invoke(app, ["diff", files[0], str(tmp_path / bad)])
        assert result.exit_code == 2
        assert said in " ".join(result.output.split())


@contextmanager
def structured_trace(folder: Path) -> Iterator[None]:
    """What ``TORCH_TRACE=folder`` does, for a part of a process."""
    handler = LazyTraceHandler(str(folder))
    handler.setFormatter(TorchLogsFormatter(trace=True))
    trace_log.addHandler(handler)
    before, trace_log.level = trace_log.level, logging.DEBUG
    try:
        yield
    finally:
        trace_log.removeHandler(handler)
        trace_log.level = before
        handler.close()


def artefacts_of(log: Path) -> dict[str, str]:
    """Payloads by name: a payload stands behind its line, each of its own lines after a tab."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in log.read_text().splitlines():
        if line.startswith("\t"):
            current.append(line[1:])
        else:
            said = json.loads(line[line.index("{") :])
            current = found.setdefault(said["artifact"]["name"], []) if "artifact" in said else []
    return {name: "\n".join(lines) for name, lines in found.items()}


def check_trace(folder: Path) -> None:
    """The text of every stage stands behind the artefact that names it; tlparse lists it."""
    (log,) = folder.glob("dedicated_log_torch_trace_*.log")
    ours = {name: text for name, text in artefacts_of(log).items() if name.startswith("bdlora_")}
    assert [*ours][:2] == ["bdlora_00_canonicalize", "bdlora_01_tag"]
    assert [*ours][-1] == "bdlora_09_drop_lora"
    assert "lora_shrink" in ours["bdlora_04_partition"]
    assert "lora_shrink" not in ours["bdlora_09_drop_lora"]
    tool = shutil.which("tlparse", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if tool is not None:
        out = folder / "page"
        subprocess.run([tool, log, "-o", out, "--no-browser"], check=True, capture_output=True, timeout=60)
        index = (out / "index.html").read_text()
        assert [name for name in ours if name not in index] == []


def test_a_run_writes_reports_names_ranges_and_traces(tmp_path: Path) -> None:
    """options={"report": ..., "nvtx": True}: files of both graphs; ranges by node key; artefacts of every stage."""
    spec = ModelSpec(heads=2, kv_heads=2, layers=2, vocabulary=64)
    model: Any
    model, _ = bd.load(save_model(spec, tmp_path / "model"))
    options = {"inner": "eager", "report": tmp_path / "reports", "nvtx": True}
    model.compile(backend="bdlora", options=options)
    with structured_trace(tmp_path / "trace"), torch.no_grad(), torch.profiler.profile() as profile:
        model(torch.ones(2, 3, dtype=torch.int64), past_key_values=bd.make_cache(model, 2, 8), logits_to_keep=1)
    names = {event.key for event in profile.key_averages()}
    assert {"model.layers.1", "before layers", "model.layers.0.self_attn.o_proj/linear"} <= names
    check_trace(tmp_path / "trace")
    told = bd.Explanation.read(tmp_path / "reports" / "graph-0.rank-0.json")
    assert (told.kind, told.tp_size, told.graphs[0].phase) == ("run", 1, "prefill (graph 0)")
    assert told.ranks is not None
    assert told.ranks.difference is None
    assert "prefill (graph 0)" in told.text()
    assert "</html>" in (tmp_path / "reports" / "graph-0.rank-0.html").read_text()
    write_and_differ(bd.reports(model)[0], tmp_path / "differ")


def test_ranges_reach_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is CUDA each node is a range of Nsight's by its key, closed before the next; also one that raises."""
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: seen.append(f"+{name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("-"))
    module = torch.fx.symbolic_trace(lambda x: (x + 1) @ x)
    for node, key in zip(list(module.graph.nodes)[1:3], ("a/add", "a/matmul"), strict=True):
        set_node_key(node, key)
    run = ranges.in_range("layer", ranges.RangedModule(module))
    run(torch.ones(2, 2))
    assert seen == ["+layer", "+a/add", "-", "+a/matmul", "-", "-"]
    seen.clear()
    with pytest.raises(RuntimeError, match="shape"):
        run(torch.ones(2, 3))
    assert seen == ["+layer", "+a/add", "-", "+a/matmul", "-", "-"]


def write_and_differ(report: bd.Report, folder: Path) -> None:
    """A rank whose graph differs is named, with the line; a folder that cannot be written ends nothing."""

    class Unlike(Alone):
        def exchange(self, topic: str, text: str, *, is_setup: bool = False) -> Sequence[str]:
            return [text, text.replace("linear", "bilinear", 1)]

    write_report(folder, report, Unlike(), 1, kind="run", phase="decode")
    told = bd.Explanation.read(folder / "graph-0.rank-1.json")
    assert told.ranks is not None
    assert told.ranks.difference is not None
    assert told.ranks.difference.startswith("rank 1 has fuse: ")
    assert "bilinear" in told.ranks.difference
    file = folder / "a file"
    file.write_text("")
    write_report(file, report, Unlike(), 0, kind="run", phase="decode")


@pytest.mark.parametrize(("option", "value"), [("report", 3), ("nvtx", "yes")])
def test_bad_options_are_named(option: str, value: object) -> None:
    from bdlora_compile.backend import CompileOptions

    with pytest.raises(bd.ConfigError, match=option):
        CompileOptions.parse({option: value})


def test_source_lines_name_no_folder_of_the_machine() -> None:
    """Behind site-packages, below the working folder, or two parts of the path; torch's own frames are left out."""
    frames = [
        ("/home/me/venv/lib/python3.11/site-packages/transformers/models/x.py", 7, "y = f(x)"),
        ("/home/me/venv/lib/python3.11/site-packages/torch/nn/functional.py", 9, "return g(x)"),
    ]
    trace = "".join(f'  File "{file}", line {line}, in forward\n    {code}\n' for file, line, code in frames)
    assert source_line(trace) == ("transformers/models/x.py:7", "y = f(x)")
    assert source_line('  File "/home/me/secret/code/mine.py", line 3, in forward\n    a = b\n') == (
        "code/mine.py:3",
        "a = b",
    )
    assert source_line(f'  File "{Path.cwd()}/pkg/own.py", line 3, in forward\n    a = b\n')[0] == "pkg/own.py:3"
    assert source_line("") == ("", "")
