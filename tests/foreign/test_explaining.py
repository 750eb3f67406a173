"""`explain` of models that their owner sharded: what localize would remove, and why not where it would not."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from slora_blocks import ModuleBlock, Whole, functional_block
from torch import Tensor
from torch.torch_version import TorchVersion
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import bdlora_compile as bd
from bdlora_compile.ir import Origin
from tests.api.test_inspector import timeless
from tests.conftest import GoldenCheck
from tests.models import AdapterSpec, ModelSpec, save_adapter, save_model

X = torch.zeros(3, 5, 16, dtype=torch.float64)


@pytest.fixture
def ranks() -> Iterator[None]:
    """Rank 0 of two that are not there."""
    with bd.pretend_ranks(2):
        yield
    assert not dist.is_initialized()


def whole() -> Whole:
    torch.manual_seed(0)
    return Whole.random(width=16, inner=48, rank=8, nblocks=2)


def lora(told: bd.Explanation, stage: str) -> int:
    """LoRA collectives after a stage."""
    return sum(one.runs for one in told.graphs[0].stage(stage).collectives if one.origin is Origin.LORA)


@pytest.mark.usefixtures("ranks")
def test_hugging_face_tensor_parallelism(tmp_path: Path, golden: GoldenCheck) -> None:
    """PEFT's adapter on a model that transformers sharded: its all-reduces go into the base's, gathers it has none."""
    model = save_model(ModelSpec(), tmp_path / "model")
    adapter = save_adapter(AdapterSpec(rank=4), model, tmp_path / "adapter")
    config = DistributedConfig(tp_size=2)
    sharded: Any = AutoModelForCausalLM.from_pretrained(model, distributed_config=config, dtype=torch.float64)
    wrapped = PeftModel.from_pretrained(sharded, adapter, autocast_adapter_dtype=False).eval()
    ids = torch.ones(2, 7, dtype=torch.int64)
    told = bd.explain(wrapped, {"input_ids": ids, "use_cache": False}, tp_size=2)
    assert (told.kind, told.model, told.num_layers) == ("foreign", "PeftModel", 2)
    assert (lora(told, "tag paths"), lora(told, "fold")) == (4, 0)
    assert "o_proj" in told.html()
    if TorchVersion(torch.__version__) >= "2.12":
        golden("hugging_face_report", timeless(told).text(width=150))


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize(("declare", "left"), [(True, 0), (False, 2)])
@pytest.mark.parametrize("build", [ModuleBlock, functional_block])
def test_handwritten_slora(build: Callable[..., Callable[[Tensor], Tensor]], declare: bool, left: int) -> None:
    """Declared factors lose their collectives; without a declaration the reason says what to declare."""
    told = bd.explain(build(whole(), declare=declare), X, tp_size=2)
    assert (lora(told, "tag paths") if declare else 2, lora(told, "fold")) == (2, left)
    reasons = [one.reason for one in told.graphs[0].stages[-1].collectives if one.origin is Origin.LORA]
    assert all("declare_block_diagonal" in (reason or "") for reason in reasons)


@pytest.mark.usefixtures("ranks")
def test_what_cannot_be_explained_is_named() -> None:
    block = ModuleBlock(whole())

    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return block(x)

    with pytest.raises(bd.ConfigError, match="collectives over 2 ranks"):
        bd.explain(block, X, tp_size=4)
    with pytest.raises(bd.ConfigError, match="no single graph"):
        bd.explain(broken, X, tp_size=2)
    with pytest.raises(bd.ConfigError, match="no collective, no DTensor"):
        bd.explain(torch.nn.Linear(16, 16), X.float(), tp_size=2)
    with pytest.raises(bd.ConfigError, match="found no inputs"):
        bd.explain(block, tp_size=2)
    with pytest.raises(bd.ConfigError, match="arguments for a model that bdlora shards"):
        bd.explain(block, X, tp_size=2, nblocks=2)
    with pytest.raises(bd.ConfigError, match="a process without one"), bd.pretend_ranks(2):
        pass
