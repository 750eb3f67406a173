"""A graph in which layers stand in for others is the one that Dynamo captures of all layers; unlike ones are traced."""

import ast
import copy
import gc
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP

import bdlora_compile as bd
from bdlora_compile import backend
from bdlora_compile.alike import number_use
from bdlora_compile.hollow import tag_of
from bdlora_compile.ir import Captured, fake_value, module_path, operator_name
from bdlora_compile.propagation import value_key
from bdlora_compile.report import Report
from bdlora_compile.stand_ins import StandIns
from bdlora_compile.unfold import unfold
from tests.models import relative_error

TOLERANCE = 2e-6
"""As for compiled models (tests/numerics/test_compiled.py): transformers' float32 norms and angles."""
LAYERS = 4
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 48,
    "vocab_size": 67,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[type, PretrainedConfig, int]] = {
    "llama with biases and tied embeddings": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        2,
    ),
    "qwen2 with two kinds of layers": (
        Qwen2ForCausalLM,
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=2),
        3,
    ),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config(**SIZES, no_rope_layer_interval=2), 3),
}
"""Class, configuration, and how many layers are traced: one of each kind, and the last."""
IDS = torch.tensor([[5, 9, 33, 61, 7, 7, 12, 3], [8, 8, 60, 4, 1, 2, 50, 6]])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain_model(cls: type = LlamaForCausalLM, config: PretrainedConfig | None = None) -> Any:
    """Random weights, large enough that every part matters to the logits, in float64."""
    torch.manual_seed(0)
    model = cls(config or LlamaConfig(**SIZES)).to(torch.float64).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    return model


def served(model: Any) -> Any:
    """The model, attached and compiled; no graph of it yet."""
    attached, _ = bd.attach(copy.deepcopy(model), max_rank=4)
    attached.compile(backend="bdlora")
    return attached


def forwards(model: Any, count: int) -> list[Tensor]:
    """Logits of the first ``count`` of: a prompt and a step over a cache."""
    cache = bd.make_cache(model, 2, 64)
    calls: list[dict[str, Any]] = [
        {"input_ids": IDS, "past_key_values": cache},
        {"input_ids": IDS[:, :1], "past_key_values": cache},
    ]
    with torch.no_grad():
        return [model(**call).logits for call in calls[:count]]


def expected_forwards(model: Any) -> list[Tensor]:
    with torch.no_grad():
        whole = model(torch.cat([IDS, IDS[:, :1]], dim=1), use_cache=False).logits
    return [whole[:, :-1], whole[:, -1:]]


def require_equal_logits(model: Any, plain: Any, count: int = 1) -> None:
    for found, expected in zip(forwards(model, count), expected_forwards(plain), strict=False):
        assert relative_error(found, expected) < TOLERANCE


def tracing(model: Any) -> str:
    return bd.reports(model)[-1].tracing


@pytest.fixture
def unfolded(monkeypatch: pytest.MonkeyPatch) -> list[list[object]]:
    """Descriptions of the graphs that the passes get."""
    found: list[list[object]] = []

    def keep(captured: Captured, stand_ins: StandIns | None) -> str:
        text = unfold(captured, stand_ins)
        found.append(described(captured))
        return text

    monkeypatch.setattr(backend, "unfold", keep)
    return found


def described(captured: Captured) -> list[object]:
    """All that the passes read of a graph, whatever the order of its placeholders and the names of its nodes."""
    names: dict[Any, str] = {}
    for index, node in enumerate(captured.graph.find_nodes(op="placeholder")):
        tag = tag_of(getattr(node.meta.get("grapharg"), "example", None))
        names[node] = f"argument {index}" if tag is None else tag.name
    weights = sorted(name for name in names.values() if not name.startswith("argument"))
    lines: list[object] = [weights]
    for node in captured.graph.nodes:
        if node.op != "placeholder":
            names[node] = f"%{len(lines)}"
            args = torch.fx.node.map_arg((node.args, node.kwargs), lambda one: Name(names[one]))  # type: ignore[arg-type]
            stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            # Where in transformers; further out a traced layer is called in another line of ours.
            place = re.findall(r'File "[^\n]*', node.meta.get("stack_trace") or "")[-1:]
            parts = (operator_name(node), str(args), module_path(node), len(stack), place)
            lines.append((*parts, str(value_key(fake_value(node)))))
    # Arguments that are no weights keep their place in Dynamo's call; which one it is shows in what they are read by.
    numbers = {text: str(at) for at, text in enumerate(dict.fromkeys(re.findall(r"argument \d+", str(lines))))}
    return [re.sub(r"argument \d+", lambda found: numbers[found[0]], str(line)) for line in lines]


class Name(str):
    """A node by its name: prints without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_is_that_of_all_layers(family: str, unfolded: list[list[object]]) -> None:
    cls, config, num_traced = FAMILIES[family]
    plain = plain_model(cls, config)
    model = served(plain)
    require_equal_logits(model, plain, count=2)
    text = f"{num_traced} of {LAYERS} layers; each of the others is like one of these"
    assert {report.tracing for report in bd.reports(model)} == {text}
    with_stand_ins = [*unfolded]
    unfolded.clear()
    torch._dynamo.reset()
    whole = served(plain)
    whole.bdlora.stand_ins.refuse("asked for by the test")
    require_equal_logits(whole, plain, count=2)
    assert tracing(whole) == "every layer: asked for by the test"
    assert len(with_stand_ins) == len(unfolded) == len(bd.reports(model))
    for found, expected in zip(with_stand_ins, unfolded, strict=True):
        assert found == expected
    assert texts(bd.reports(model)) == texts(bd.reports(whole))


def texts(reports: Any) -> list[list[str]]:
    """The graphs after each pass from the one on that keeps a layer of each kind."""

    def of(report: Report) -> list[str]:
        names = [stage.name for stage in report.stages]
        return [stage.text for stage in report.stages[names.index("deduplicate") :]]

    return [of(report) for report in reports]


@pytest.mark.parametrize(
    ("target", "sabotage"),
    [
        ("bdlora_compile.unfold._renumber", lambda *arguments: None),
        ("bdlora_compile.unfold._WeightsOfTwins.of", lambda weights, node, layer, number: node),
    ],
    ids=["the traced layer's part of the cache", "the traced layer's weights"],
)
def test_a_copy_that_keeps_what_is_not_its_own_is_noticed(
    target: str, sabotage: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the test above."""
    monkeypatch.setattr(target, sabotage)
    plain = plain_model()
    model = served(plain)
    with pytest.raises(AssertionError, match="relative_error"):
        require_equal_logits(model, plain, count=2)


def scaled(model: Any) -> None:
    model.model.layers[2].self_attn.scaling *= 3


def hooked(model: Any) -> None:
    model.model.layers[2].mlp.act_fn.register_forward_hook(lambda module, args, output: output * 2)


def replaced(model: Any) -> None:
    model.model.layers[2].mlp.act_fn = nn.Tanh()


@pytest.mark.parametrize("change", [scaled, hooked, replaced])
def test_a_layer_that_is_changed_after_loading_is_traced_itself(change: Callable[[Any], None]) -> None:
    plain = plain_model()
    model = served(plain)
    change(model)
    change(plain)
    require_equal_logits(model, plain)
    assert tracing(model) == "3 of 4 layers; each of the others is like one of these"


@pytest.mark.parametrize("change", [scaled, hooked, replaced])
def test_a_layer_that_is_changed_after_compiling_is_traced_then(change: Callable[[Any], None]) -> None:
    plain = plain_model()
    model = served(plain)
    require_equal_logits(model, plain)
    compiled = len(bd.reports(model))
    change(model)
    change(plain)
    require_equal_logits(model, plain)
    assert len(bd.reports(model)) == 2 * compiled
    assert tracing(model) == "3 of 4 layers; each of the others is like one of these"


class NumberedMLP(LlamaMLP):  # type: ignore[misc]  # transformers is untyped for mypy
    """An MLP that is another function in every third layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.layer_idx % 3)


class CountingMLP(LlamaMLP):  # type: ignore[misc]  # transformers is untyped for mypy
    """An MLP that keeps something from one layer to the next."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.shape
        return super().forward(x)


def test_code_that_reads_the_layers_number_has_every_layer_traced() -> None:
    plain = plain_model()
    for number, layer in enumerate(plain.model.layers):
        layer.mlp.__class__ = NumberedMLP
        layer.mlp.layer_idx = number
    model = served(plain)
    require_equal_logits(model, plain)
    assert re.fullmatch(
        r"every layer: the layers' code may depend on their number \(tests.numerics.test_stand_ins, line \d+\)",
        tracing(model),
    )


class ParsesAtItsEnd:
    """Garbage that only the collector finds, and whose end parses a source, as formatting a traceback does."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        ast.parse("a = 1")


def test_sources_are_read_whatever_the_collector_ends_meanwhile() -> None:
    """CPython 3.11 runs the collector inside of its parser, and has one counter of depth for both."""
    model = plain_model()
    thresholds = gc.get_threshold()
    ParsesAtItsEnd()
    try:
        gc.set_threshold(50)
        assert number_use(model.model.layers) == ""
    finally:
        gc.set_threshold(*thresholds)


def test_code_that_writes_to_its_module_has_every_layer_traced() -> None:
    plain = plain_model()
    plain.model.layers[1].mlp.__class__ = CountingMLP
    assert served(plain).bdlora.stand_ins.reason.startswith("the layers' code may depend on their number (tests.")


def test_methods_that_others_put_into_a_class_have_every_layer_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", NumberedMLP.forward)
    found = served(plain_model()).bdlora.stand_ins.reason
    assert "LlamaMLP.forward, which is of another file" in found


def test_layers_that_get_other_masks_after_all_are_traced_in_the_same_forward() -> None:
    """The model's own loop chooses masks by the configuration: the layers cannot tell."""
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=LAYERS - 1)
    plain = plain_model(Qwen2ForCausalLM, config)
    model = served(plain)
    for changed in (model, plain):
        changed.config.layer_types = ["full_attention", "sliding_attention", *changed.config.layer_types[2:]]
    require_equal_logits(model, plain)
    assert re.match(
        r"every layer: node \w+ model.layers.1: found causal_mask_1: .*, expected causal_mask as", tracing(model)
    )


def test_tensors_of_the_same_kind_reach_the_layer_that_got_them() -> None:
    """Angles that differ from layer to layer by their values alone need no trace of their own."""
    plain = plain_model()
    model = served(plain)
    for changed in (model, plain):
        layer = changed.model.layers[2]
        changed.model.forward = forward_with_own_angles(changed.model, layer)
    require_equal_logits(model, plain)
    assert tracing(model) == "2 of 4 layers; each of the others is like one of these"


def forward_with_own_angles(decoder: Any, odd: nn.Module) -> Callable[..., Any]:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    def forward(input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        hidden = decoder.embed_tokens(input_ids)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = (torch.arange(hidden.shape[1]) + seen)[None]
        mask = None
        if past_key_values is not None:
            from bdlora_compile.runtime.attention import row_table

            cache = past_key_values
            mask = row_table(cache.starts, cache.lengths, hidden.shape[1], cache.length)
        angles, others = decoder.rotary_emb(hidden, positions), decoder.rotary_emb(hidden, positions * 2)
        for layer in decoder.layers:
            hidden = layer(
                hidden,
                attention_mask=mask if past_key_values is not None else None,
                past_key_values=past_key_values,
                position_embeddings=others if layer is odd else angles,
            )
        return BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden), past_key_values=past_key_values)

    return forward


def test_other_ways_to_call_trace_every_layer() -> None:
    """Only forwards of the model itself look at the layers before they run."""
    plain = plain_model()
    model, _ = bd.attach(copy.deepcopy(plain), max_rank=4)
    step = torch.compile(model, backend="bdlora")
    with torch.no_grad():
        assert relative_error(step(input_ids=IDS, use_cache=False).logits, expected_forwards(plain)[0]) < TOLERANCE
    assert tracing(model).startswith("every layer: the forward was not called by `model(...)`")


def test_arguments_that_cannot_be_compared_trace_every_layer() -> None:
    plain = plain_model()
    model = served(plain)
    with torch.no_grad():
        found = model(IDS, something={"a": 1}).logits
    assert relative_error(found, expected_forwards(plain)[0]) < TOLERANCE
    assert tracing(model) == "every layer: they have arguments that are not compared"
