"""A name that is loaded again, or unloaded, while rows use it; what makes a version."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bdlora_compile as bd
from tests.api.conftest import TOLERANCE, Files, Served


def test_another_content_is_another_version(served: Served) -> None:
    """Rows that run finish on the contents they began with, bit by bit; later ones get the new."""
    adapters = served.adapters
    adapters.load("x", served.paths["a0"])
    first = adapters.version("x")
    with adapters.use(["x", None]):
        before = served.logits()
        adapters.load("x", served.paths["a1"])
        assert adapters.version("x") != first
        assert torch.equal(served.logits(), before)
        with adapters.use(["x", None]):
            assert served.error(["a1", None]) < TOLERANCE
        assert torch.equal(served.logits(), before)
        assert adapters.stats().resident == 2
    assert adapters.stats().resident == 1, "the former contents went with their last row"
    adapters.load("x", served.paths["a0"])
    assert adapters.version("x") == first
    with adapters.use(["x", None]):
        assert torch.equal(served.logits(), before)


def test_the_same_content_again_changes_nothing(served: Served) -> None:
    adapters = served.adapters
    info = adapters.load("x", served.paths["a0"])
    assert adapters.load("x", served.paths["a0"]) == info
    assert adapters.load("y", served.paths["a0"]).version == info.version
    assert adapters.stats().resident == 2


def test_a_pinned_name_that_is_loaded_again_stays_pinned_and_resident(served: Served) -> None:
    served.load("a0", "a1")
    served.adapters.pin("a0")
    served.adapters.load("a0", served.paths["a2"])
    info = served.adapters["a0"]
    assert info.is_pinned
    assert info.is_resident
    served.adapters.unpin("a0")


def test_a_pinned_name_that_has_no_room_for_new_contents_keeps_the_former(served: Served) -> None:
    """Rows use the former, and another adapter; nothing can leave."""
    adapters = served.adapters
    served.load("a0", "a1")
    adapters.pin("a0")
    version = adapters.version("a0")
    with adapters.use(["a0", "a1"]):
        before = served.logits()
        with pytest.raises(bd.AdapterError, match="taken by 2 adapters"):
            adapters.load("a0", served.paths["a2"])
        assert adapters.version("a0") == version
        assert torch.equal(served.logits(), before)


def test_an_adapter_in_use_that_is_unloaded_serves_its_rows_to_the_end(served: Served) -> None:
    adapters = served.adapters
    served.load("a0", "a1")
    with adapters.use(["a0", "a1"]):
        before = served.logits()
        adapters.unload("a0")
        assert "a0" not in adapters
        assert torch.equal(served.logits(), before)
        adapters.load("a0", served.paths["a3"])
        assert not adapters["a0"].is_resident, "its slot is not free yet"
        assert torch.equal(served.logits(), before)
    with adapters.use(["a0", None]):
        assert served.error(["a3", None]) < TOLERANCE


def rewrite(field: str, value: object) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))

    return act


def change_a_weight(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    list(tensors.values())[3][1, 1] *= 1.0001
    save_file(tensors, path)


def store_in_another_order(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"written": "again"})


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        (change_a_weight, True),
        (rewrite("lora_alpha", 13), True),
        (rewrite("use_rslora", True), True),
        (rewrite("lora_dropout", 0.5), False),
        (rewrite("inference_mode", False), False),
        (store_in_another_order, False),
    ],
    ids=["weight", "alpha", "rslora", "dropout", "inference_mode", "file"],
)
def test_a_version_is_what_changes_the_mathematics(
    served: Served, tmp_path: Path, change: Callable[[Path], None], is_another: bool
) -> None:
    first = served.adapters.load("x", served.paths["a0"]).version
    copy = shutil.copytree(served.paths["a0"], tmp_path / "copy")
    change(copy)
    assert (served.adapters.load("x", copy).version != first) == is_another


@pytest.mark.parametrize("size", [1, 2])
def test_a_version_does_not_depend_on_the_ranks(served: Served, files: Files, size: int) -> None:
    _, adapters = bd.load(files.model, {"a1": served.paths["a1"]}, ranks=bd.Ranks.lockstep(size))
    assert adapters.version("a1") == served.adapters.load("a1", served.paths["a1"]).version
