"""A model without weights, run, copied, converted or compiled in another way: each says what to do."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

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
