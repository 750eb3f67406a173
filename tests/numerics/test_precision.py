"""Dtypes, batch sizes, padding and positions through the compiled model, against PEFT alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

import bdlora_compile as bd
from tests.models import AdapterSpec, ModelSpec, Reference, relative_error, save_adapter, save_model

DEGREE = 4
ROWS = ["blocks", None, "swapped", "plain", "blocks"]
SPECS = {
    "blocks": AdapterSpec(rank=8, nblocks=4),
    "swapped": AdapterSpec(rank=8, nblocks=4, swapped=True),
    "plain": AdapterSpec(rank=5),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A model and its adapters."""
    folder = tmp_path_factory.mktemp("precision")
    model = save_model(ModelSpec(heads=8, kv_heads=2, layers=2), folder / "model")
    paths = {name: save_adapter(spec, model, folder / name, seed) for seed, (name, spec) in enumerate(SPECS.items())}
    return model, paths


def served(files: tuple[Path, dict[str, Path]], dtype: torch.dtype) -> tuple[Any, Any]:
    torch._dynamo.reset()
    model, adapters = bd.load(*files, dtype=dtype, ranks=bd.Ranks.lockstep(DEGREE))
    model.compile(backend="bdlora")
    return model, adapters


@pytest.fixture(scope="module")
def double(files: tuple[Path, dict[str, Path]]) -> tuple[Any, Any]:
    """The compiled model in float64, shared by the tests of this file."""
    return served(files, torch.float64)


def batch(rows: int, length: int) -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randint(3, 120, (rows, length))


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 2e-6), (torch.bfloat16, 2.0**-8)])
def test_narrow_dtypes_are_as_good_as_peft(
    files: tuple[Path, dict[str, Path]], dtype: torch.dtype, floor: float
) -> None:
    """Rounding is amplified by random layers: PEFT's own error in the dtype, doubled, is the measure.

    The floor is one rounding: sums of ranks' parts are rounded in another order than one device's.
    """
    model, adapters = served(files, dtype)
    ids = batch(len(ROWS), 9)
    exact = Reference(*files, torch.float64).logits(ids, ROWS)
    own = relative_error(Reference(*files, dtype).logits(ids, ROWS), exact)
    with adapters.use(ROWS), torch.no_grad():
        found = relative_error(model(ids).logits, exact)
    assert found < 2 * own + floor


def test_a_narrower_dtype_would_be_noticed(files: tuple[Path, dict[str, Path]]) -> None:
    """The twin: the bound for float32 refuses what bfloat16 computes."""
    ids = batch(len(ROWS), 9)
    exact = Reference(*files, torch.float64).logits(ids, ROWS)
    own = relative_error(Reference(*files, torch.float32).logits(ids, ROWS), exact)
    coarse = relative_error(Reference(*files, torch.bfloat16).logits(ids, ROWS), exact)
    assert coarse > 2 * own + 2e-6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [1, 5])
def test_padding_on_either_side(
    double: tuple[Any, Any], files: tuple[Path, dict[str, Path]], rows: int, side: str
) -> None:
    """float64 but for norms and angles, which transformers computes in float32: 2e-7 is measured."""
    model, adapters = double
    ids, names = batch(rows, 8), ROWS[:rows]
    mask = torch.ones_like(ids)
    mask[0, slice(0, 3) if side == "left" else slice(5, 8)] = 0
    with adapters.use(names), torch.no_grad():
        found = model(ids, attention_mask=mask).logits
    expected = Reference(*files, torch.float64).logits(ids, names, mask)
    keep = mask.bool()
    assert relative_error(found[keep], expected[keep]) < 2e-6


def test_positions_that_the_caller_gives(double: tuple[Any, Any], files: tuple[Path, dict[str, Path]]) -> None:
    """Rotary positions are relative: a shift of all changes nothing, another order does."""
    model, adapters = double
    ids = batch(2, 8)
    positions = torch.arange(8).expand(2, 8)
    expected = Reference(*files, torch.float64).logits(ids, ["plain", None])
    with adapters.use(["plain", None]), torch.no_grad():
        shifted = model(ids, position_ids=positions + 17).logits
        reversed_ = model(ids, position_ids=positions.flip(1)).logits
    # Angles are float32: a shift of 17 moves their rounding.
    assert relative_error(shifted, expected) < 2e-5
    assert relative_error(reversed_, expected) > 1e-2
