"""Stand-ins for the few modules that vLLM's and SGLang's LoRA kernels import besides torch and Triton.

The kernels, their default configurations and SGLang's plan table are the peers' own, read from a folder that
`fetch_peers.sh` fills; logging, switches, platform queries and registration of operators are replaced here.
"""

import logging
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl


class Phase(StrEnum):
    """SGLang's phases of a forward."""

    DECODE = "decode"
    PREFILL = "prefill"


@dataclass
class BatchInfo:
    """The fields of SGLang's batch description that its kernels read."""

    use_cuda_graph: bool
    num_segments: int
    seg_indptr: Any
    weight_indices: Any
    lora_ranks: Any
    scalings: Any
    max_len: int
    permutation: Any
    bs: int = 0
    seg_lens: Any = None


class _Switch:
    def __init__(self, value: object) -> None:
        self._value = value

    def get(self) -> object:
        return self._value


def install(root: Path) -> None:
    """Make the peers' kernel modules importable from ``root``."""
    for package in (
        "vllm", "vllm.lora", "vllm.lora.ops", "vllm.lora.ops.triton_ops", "vllm.utils",
        "sglang", "sglang.kernels", "sglang.kernels.jit", "sglang.kernels.ops", "sglang.kernels.ops.lora",
        "sglang.kernels.ops.lora.common", "sglang.kernels.ops.lora.dense", "sglang.kernels.ops.lora.moe",
        "sglang.srt", "sglang.srt.lora", "sglang.srt.lora.dense",
    ):  # fmt: skip
        _module(package, root.joinpath(*package.split(".")))
    _vllm()
    _sglang()


def _vllm() -> None:
    _module(
        "vllm.envs", VLLM_BATCH_INVARIANT=False, VLLM_TUNED_CONFIG_FOLDER=None,
        VLLM_LORA_ENABLE_DUAL_STREAM=False, VLLM_LORA_DISABLE_PDL=False,
    )  # fmt: skip
    logger: Any = logging.getLogger("vllm")
    logger.warning_once = logger.info_once = lambda *_, **__: None
    _module("vllm.logger", init_logger=lambda name: logger)
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    _module(
        "vllm.platforms",
        current_platform=SimpleNamespace(
            is_cuda=lambda: True,
            has_device_capability=lambda wanted: capability >= wanted,
            is_device_capability=lambda wanted: capability == wanted,
        ),
    )
    _module("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)

    def refuse(**_: object) -> None:
        # The peers' files then keep their plain functions.
        raise AttributeError("operators are called directly")

    _module(
        "vllm.utils.torch_utils", direct_register_custom_op=refuse,
        async_tensor_h2d=lambda data, dtype, device: torch.tensor(data, dtype=dtype, device=device),
    )  # fmt: skip
    _module("vllm.triton_utils", tl=tl, triton=triton)


def _sglang() -> None:
    _module("sglang.kernels.jit.utils", is_arch_support_pdl=lambda: True)
    _module("sglang.kernels.ops.lora.moe.virtual_experts", _align_block_size_jit=None)
    _module(
        "sglang.srt.environ",
        envs=SimpleNamespace(
            SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=_Switch(False),
            SGLANG_ENABLE_DETERMINISTIC_INFERENCE=_Switch(False),
            SGLANG_LORA_DENSE_CONFIG_DIR=_Switch(None),
        ),
    )
    _module(
        "sglang.srt.utils", cached_triton_kernel=lambda key_fn=None: lambda kernel: kernel,
        get_device_name=torch.cuda.get_device_name,
    )  # fmt: skip
    _module(
        "sglang.srt.lora.utils", Phase=Phase, LoRABatchInfo=BatchInfo,
        architecture_for_capability=lambda major: "sm90" if major == 9 else "default",
    )  # fmt: skip


def _module(name: str, path: Path | None = None, **members: object) -> None:
    module = ModuleType(name)
    if path is not None:
        module.__path__ = [str(path)]
    module.__dict__.update(members)
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)
