"""What nobody should do to a model, or pass to `load` and `attach`: each error says what to do instead."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

import bdlora_compile as bd
from tests.api.conftest import Files

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

IDS = torch.tensor([[5, 9, 33, 71]])


def _wrapped(model: Any) -> Any:
    return torch.compile(model, backend="bdlora")


RUNS: dict[str, Callable[[Any], Any]] = {
    "uncompiled": lambda model: model(IDS),
    "generate": lambda model: model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=1),
    "inner model": lambda model: model.model(IDS),
    "layer": lambda model: model.model.layers[0](torch.randn(1, 2, 32)),
    "linear": lambda model: model.lm_head(torch.randn(1, 32)),
    "embedding": lambda model: model.get_input_embeddings()(IDS),
    "eager": lambda model: torch.compile(model, backend="eager")(IDS),
    "aot_eager": lambda model: torch.compile(model, backend="aot_eager")(IDS),
    "inductor": lambda model: torch.compile(model, backend="inductor")(IDS),
    "wrapped generate": lambda model: _wrapped(model).generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=1
    ),
}

CONVERSIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "to": (lambda model: model.to(torch.bfloat16), "dtype="),
    "half": (lambda model: model.half(), "dtype="),
    "float": (lambda model: model.float(), "dtype="),
    "cuda": (lambda model: model.cuda(), "device="),
    "cpu": (lambda model: model.cpu(), "device="),
    "deepcopy": (copy.deepcopy, "second time"),
    "pickle": (pickle.dumps, "other process"),
    "state_dict": (lambda model: model.state_dict(), "folder"),
    "load_state_dict": (lambda model: model.load_state_dict({}), "folder"),
    "save_pretrained": (lambda model: model.save_pretrained("nowhere"), "folder"),
    "resize": (lambda model: model.resize_token_embeddings(256), "resize and save"),
}


@pytest.mark.parametrize("run", RUNS)
def test_other_runs_are_refused(files: Files, run: str) -> None:
    """Without the backend there are no weights: the error names the call that brings them."""
    model, _ = bd.load(files.model)
    with torch.no_grad(), pytest.raises(bd.HollowError, match=r"model\.compile\(backend='bdlora'\)"):
        RUNS[run](model)


@pytest.mark.parametrize("call", CONVERSIONS)
def test_conversions_are_refused(files: Files, call: str) -> None:
    """Each error has its own remedy."""
    model, _ = bd.load(files.model)
    convert, remedy = CONVERSIONS[call]
    with pytest.raises(bd.HollowError, match=remedy):
        convert(model)


def test_past_the_recompile_limit(files: Files) -> None:
    """Where Dynamo would go on uncompiled, the error says so."""
    model, _ = bd.load(files.model)
    model.compile(backend="bdlora")
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        model(IDS)
        with pytest.raises(bd.HollowError, match="recompile limit"):
            model(IDS, output_hidden_states=True)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"options": {"iner": "eager"}}, "iner.*inner"),
        ({"options": {"inner": "onnx"}}, "onnx.*'eager' or 'inductor'"),
        ({"mode": "max-autotune"}, "max-autotune.*options="),
    ],
)
def test_unknown_options(files: Files, settings: dict[str, Any], match: str) -> None:
    """Nothing is ignored: the error names what may be given."""
    model, _ = bd.load(files.model)
    model.compile(backend="bdlora", **settings)
    with torch.no_grad(), pytest.raises(bd.ConfigError, match=match):
        model(IDS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dtype": "bf16"}, r"dtype: found 'bf16', .* torch\.bfloat16"),
        ({"dtype": "float16"}, r"dtype: found 'float16', .* torch\.bfloat16"),
        ({"dtype": torch.int8}, r"dtype: found torch\.int8, expected a floating-point"),
        ({"adapters": ["path"]}, "adapters: found a list, expected folders by name; pass a dict"),
        ({"adapters": "path"}, "adapters: found a str, expected folders by name; pass a dict"),
    ],
)
def test_arguments_of_a_wrong_type(files: Files, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(bd.ConfigError, match=said):
        bd.load(files.model, **arguments)


def test_attach_refuses_adapters_without_names(files: Files) -> None:
    """And leaves the model as it was."""
    model = AutoModelForCausalLM.from_pretrained(files.model)
    wrong: Any = ["path"]
    with pytest.raises(bd.ConfigError, match="adapters: found a list"):
        bd.attach(model, wrong)
    bd.attach(model)


ALONE = r"torchrun: found WORLD_SIZE=2 and no process group, .*init_process_group\(\) before load, or pass ranks="


def test_processes_of_torchrun_without_a_group_are_refused(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would hold the whole model; one that was to be attached is as it was."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = AutoModelForCausalLM.from_pretrained(files.model).eval()
    with torch.no_grad():
        before = model(IDS).logits
    with pytest.raises(bd.ConfigError, match=ALONE):
        bd.load(files.model)
    with pytest.raises(bd.ConfigError, match=ALONE):
        bd.attach(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)


def test_processes_of_torchrun_with_a_group_load(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin; whoever passes the ranks needs no group, and neither does a single process."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    bd.load(files.model, ranks=bd.Ranks.lockstep(1))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        assert bd.Ranks.of_process_group().mesh.size == 2
        bd.load(files.model)
    finally:
        dist.destroy_process_group()
    monkeypatch.setenv("WORLD_SIZE", "1")
    bd.load(files.model)


def test_a_name_that_is_no_folder_and_not_on_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, whatever the hub's library says in how many."""

    def unreachable(*_: object, **__: object) -> str:
        raise FileNotFoundError("Name or service not known\nPlease check your internet connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    said = r"SmolLM2: found no such folder, and nothing on the hub \(FileNotFoundError: Name or service not known\)"
    with pytest.raises(bd.ConfigError, match=said) as found:
        bd.load("SmolLM2")
    assert "\n" not in str(found.value)
