"""`attach`, models that were never attached, and one process without a process group."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import bdlora_compile as bd
from tests.api.conftest import Files
from tests.models import Reference, relative_error

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

TOLERANCE = 2e-6
"""Norms and rotary angles are float32 in transformers' own code, also in a float64 model: 2e-7 is measured."""
IDS = torch.tensor([[5, 9, 33, 71], [8, 8, 100, 4], [17, 3, 64, 90]])


def plain(files: Files) -> Any:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(files.model, dtype=torch.float64).eval()


def peft(files: Files) -> Any:
    """The model with both adapters, as PEFT loads it."""
    names = list(files.adapters)
    model = PeftModel.from_pretrained(
        plain(files), files.adapters[names[0]], adapter_name=names[0], autocast_adapter_dtype=False
    )
    for name in names[1:]:
        model.load_adapter(files.adapters[name], adapter_name=name, autocast_adapter_dtype=False)
    return model.double().eval()


def compare(model: Any, adapters: Any, files: Files, rows: list[str | None]) -> float:
    """Relative error of the compiled logits."""
    model.compile(backend="bdlora")
    with adapters.use(rows), torch.no_grad():
        found = model(IDS).logits
    return relative_error(found, Reference(files.model, files.adapters, torch.float64).logits(IDS, rows))


@pytest.mark.parametrize("degree", [1, 2])
def test_model_in_memory(files: Files, degree: int) -> None:
    """A plain model with adapters from folders; alone (no process group) and on two ranks."""
    assert not torch.distributed.is_initialized()
    ranks = bd.Ranks.lockstep(degree) if degree > 1 else None
    model, adapters = bd.attach(plain(files), files.adapters, ranks=ranks)
    assert adapters.names == ("blocks", "plain")
    assert compare(model, adapters, files, ["blocks", None, "plain"]) < TOLERANCE


@pytest.mark.parametrize("degree", [1, 2])
def test_peft_model_brings_its_adapters(files: Files, degree: int) -> None:
    """The adapters that PEFT loaded are in the set under their own names."""
    ranks = bd.Ranks.lockstep(degree) if degree > 1 else None
    model, adapters = bd.attach(peft(files), ranks=ranks)
    assert adapters.names == ("blocks", "plain")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert compare(model, adapters, files, ["plain", "blocks", None]) < TOLERANCE


def test_wrong_adapter_is_noticed(files: Files) -> None:
    """The comparison above sees a row that has its neighbour's adapter."""
    model, adapters = bd.attach(peft(files))
    model.compile(backend="bdlora")
    with adapters.use(["plain", "blocks", None]), torch.no_grad():
        found = model(IDS).logits
    reference = Reference(files.model, files.adapters, torch.float64)
    assert relative_error(found, reference.logits(IDS, ["blocks", "plain", None])) > 1e-3


def test_one_process_generates(files: Files) -> None:
    """No process group: greedy tokens are PEFT's."""
    model, adapters = bd.load(files.model, files.adapters, dtype=torch.float64)
    model.compile(backend="bdlora")
    model.generation_config.eos_token_id = None
    rows = ["blocks", None, "plain"]
    with adapters.use(rows):
        tokens = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    expected = Reference(files.model, files.adapters, torch.float64).generate(IDS, rows, torch.ones_like(IDS), 5)
    assert torch.equal(tokens[:, 4:], expected)


@pytest.mark.parametrize("make", [plain, peft])
def test_a_model_that_was_never_attached_is_refused(files: Files, make: Any) -> None:
    """The error names the call, through `model.compile` and through `torch.compile`."""
    model = make(files)
    wrapped: Any = torch.compile(model, backend="bdlora")
    model.compile(backend="bdlora")
    for call in (model, wrapped):
        with pytest.raises(Exception, match=r"bdlora_compile\.attach\(model\)") as caught, torch.no_grad():
            call(IDS)
        assert isinstance(getattr(caught.value, "inner_exception", caught.value), bd.HollowError)


def test_attach_refuses_what_it_cannot_take(files: Files) -> None:
    """A part of a model, and a model that is attached already."""
    with pytest.raises(bd.ConfigError, match="whole model"):
        bd.attach(plain(files).model)
    model, _ = bd.attach(plain(files))
    with pytest.raises(bd.ConfigError, match="attached already"):
        bd.attach(model)


def test_merged_adapters_are_refused(files: Files) -> None:
    """A merged adapter is in the base weights: taking the model apart would serve it to every row."""
    model = peft(files)
    model.merge_adapter(["plain"])
    with pytest.raises(bd.ConfigError, match="merge"):
        bd.attach(model)
