"""LoRA on the embedding and on the logits, against PEFT in float64: every rank holds its piece of the vocabulary."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners import BdLoraConfig

import bdlora_compile as bd
from bdlora_compile.ir import Origin
from bdlora_compile.model import Strategy
from tests.models import (
    ALL_SITES,
    VOCABULARY,
    AdapterSpec,
    ModelSpec,
    Reference,
    relative_error,
    save_adapter,
    save_model,
)

TOLERANCE = 2e-6
"""As in test_compiled: norms and rotary angles are float32 in transformers' own code; 3e-7 is measured."""

HEAD_BLOCKS = {
    "use_bdlora": BdLoraConfig(target_modules_bd_b=["lm_head", "q_proj"], nblocks=4),
}
SPECS = {
    "both": AdapterSpec(rank=5, targets=VOCABULARY),
    "embedding": AdapterSpec(rank=3, targets=("embed_tokens",), options={"use_rslora": True}),
    "head": AdapterSpec(rank=4, targets=("lm_head", "v_proj"), options={"rank_pattern": {"lm_head": 6}}),
    "all": AdapterSpec(rank=4, targets=(*ALL_SITES, *VOCABULARY), options={"alpha_pattern": {"embed_tokens": 5}}),
    "layers": AdapterSpec(rank=4, nblocks=2),
}

Written = tuple[Path, dict[str, Path]]
Write = Callable[[ModelSpec, Mapping[str, AdapterSpec]], Written]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a model and adapters."""

    def files(spec: ModelSpec, specs: Mapping[str, AdapterSpec]) -> Written:
        model = save_model(spec, tmp_path / "model")
        return model, {
            name: save_adapter(adapter, model, tmp_path / name, seed)
            for seed, (name, adapter) in enumerate(specs.items())
        }

    return files


def compiled(model: Path, paths: Mapping[str, Path], degree: int, strategy: Strategy, **more: Any) -> tuple[Any, Any]:
    torch._dynamo.reset()
    ranks = bd.Ranks.lockstep(degree) if degree > 1 else None
    loaded, adapters = bd.load(model, paths, dtype=torch.float64, ranks=ranks, strategy=strategy, **more)
    loaded.compile(backend="bdlora")
    return loaded, adapters


@pytest.mark.parametrize("strategy", ["local", "slora"])
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_prefill_and_decode_equal_peft(write: Write, tied: bool, degree: int, strategy: Strategy) -> None:
    """One padded batch with adapters that touch the vocabulary, that do not, and none; 131 ids do not divide."""
    model, paths = write(ModelSpec(vocabulary=131, tied=tied), SPECS)
    loaded, adapters = compiled(model, paths, degree, strategy)
    rows = [*paths, None]
    torch.manual_seed(1)
    ids = torch.randint(3, 131, (len(rows), 6))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[-1, :2] = 0
    reference = Reference(model, paths, torch.float64)
    with adapters.use(rows), torch.no_grad():
        logits = loaded(ids, attention_mask=mask).logits
        # The prompt's forward makes the logits of the last token alone: the slots of those tokens, not of all.
        found = loaded.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    keep = mask.bool()
    assert relative_error(logits[keep], reference.logits(ids, rows, mask)[keep]) < TOLERANCE
    whole = torch.cat([mask, torch.ones(len(rows), 3, dtype=mask.dtype)], dim=1)
    expected = reference.logits(found.sequences, rows, whole)[:, ids.shape[1] - 1 : -1]
    assert relative_error(torch.stack(found.logits, dim=1), expected) < TOLERANCE
    for report in bd.reports(loaded):
        census = report.stages[-1].census
        assert report.base_only[-1].census.total(Origin.LORA) == 0
        if degree > 1:
            # Outside the layers: an all-reduce of h at the embedding, an all-gather at the logits.
            outside = {key[1:]: count for key, count in census.counts.items() if key[0] == "outside layers"}
            lora = {("lora", "all_reduce"): 1, ("lora", "all_gather_into_tensor"): 1} if strategy == "slora" else {}
            base = {("base", "all_reduce"): 1, ("base", "all_gather_into_tensor"): 1}
            assert outside == base | lora
