"""A checkpoint and adapters with random numbers, written once; nothing is downloaded."""

import json
import math
import shutil
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners import BdLoraConfig
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from bdlora_compile.known_models import known_config

COLUMN_SITES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_SITES = ("o_proj", "down_proj")
ATTENTION_SITES = ("q_proj", "k_proj", "v_proj", "o_proj")
CONTENTS = 4
"""Adapters of a kind that differ; further names share their files, and have their own room in the pool."""

_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class AdapterKind:
    """What an adapter is like.

    Attributes:
        rank: R.
        nblocks: blocks G; 0 is an ordinary adapter.
        only_attention: q, k, v, o alone.
    """

    rank: int
    nblocks: int = 0
    only_attention: bool = False

    @property
    def text(self) -> str:
        """As tables have it."""
        kind = f"BD r={self.rank} G={self.nblocks}" if self.nblocks else f"ordinary r={self.rank}"
        return kind + (", attention" if self.only_attention else "")

    def local_rank(self, size: int) -> int:
        """Rank of the factors on one of ``size`` ranks."""
        return self.rank // min(self.nblocks, size) if self.nblocks else self.rank

    def config(self) -> LoraConfig:
        """PEFT's configuration."""
        sites = ATTENTION_SITES if self.only_attention else COLUMN_SITES + ROW_SITES
        settings: dict[str, Any] = {"r": self.rank, "lora_alpha": self.rank, "target_modules": list(sites)}
        if self.nblocks:
            settings["use_bdlora"] = BdLoraConfig(
                target_modules_bd_a=[site for site in ROW_SITES if site in sites],
                target_modules_bd_b=[site for site in COLUMN_SITES if site in sites],
                nblocks=self.nblocks,
            )
        return LoraConfig(**settings)


def model_config(name: str, layers: int | None) -> PretrainedConfig:
    """A known configuration by name (see `bdlora explain --config`) or of a folder, with fewer layers if asked for."""
    config = AutoConfig.from_pretrained(name) if Path(name).is_dir() else known_config(name)
    if layers is not None:
        config.num_hidden_layers = layers
    return config


def roomy_folder(num_bytes: int) -> Path:
    """A new folder: in memory where there is room for so many bytes, else on disk."""
    shared = Path("/dev/shm")
    in_memory = shared.is_dir() and shutil.disk_usage(shared).free > 1.2 * num_bytes
    return Path(tempfile.mkdtemp(prefix="bench-decode-", dir=shared if in_memory else None))


def write_model(config: PretrainedConfig, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """A checkpoint of random weights in transformers' own initial scale."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = torch.ones(parameter.shape, dtype=dtype, device=device)
        if parameter.ndim > 1:
            values.normal_(std=config.initializer_range, generator=generator)
        shard[name] = values.cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > _SHARD_BYTES:
            _write_shard(shard, folder, index)
    _write_shard(shard, folder, index)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)


def write_sparse_model(config: PretrainedConfig, folder: Path) -> None:
    """A checkpoint in bf16 whose data are holes of the file system: it reads as zeros, and takes no room on disk."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, tuple[int, ...]] = {}
    index: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        shapes[name] = tuple(parameter.shape)
        # As real checkpoints are: one file of 141 GB could not be mapped by a machine that has less memory.
        if 2 * sum(map(math.prod, shapes.values())) > _SHARD_BYTES:
            _write_holes(shapes, folder, index)
    _write_holes(shapes, folder, index)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)


def _write_holes(shapes: dict[str, tuple[int, ...]], folder: Path, index: dict[str, str]) -> None:
    """A file for tensors of these shapes, which has their header alone; forgets the shapes."""
    if not shapes:
        return
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = folder / _next_shard(index)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)
    index.update(dict.fromkeys(shapes, path.name))
    shapes.clear()


def _next_shard(index: dict[str, str]) -> str:
    return f"model-{len(set(index.values())):05d}.safetensors"


def _write_shard(shard: dict[str, torch.Tensor], folder: Path, index: dict[str, str]) -> None:
    if not shard:
        return
    file = _next_shard(index)
    save_file(shard, folder / file, {"format": "pt"})
    index.update(dict.fromkeys(shard, file))
    shard.clear()


def write_adapters(
    kinds: Mapping[str, AdapterKind], config: PretrainedConfig, folder: Path, dtype: torch.dtype, device: torch.device
) -> None:
    """`CONTENTS` adapters of each kind, in folders ``name-0`` to ``name-3``; both factors are far from zero."""
    generator = torch.Generator(device).manual_seed(1)
    for name, kind in kinds.items():
        with torch.device("meta"):
            model = get_peft_model(AutoModelForCausalLM.from_config(config, dtype=dtype), kind.config())
        shapes = {key: value.shape for key, value in get_peft_model_state_dict(model).items()}
        for number in range(CONTENTS):
            out = folder / f"{name}-{number}"
            out.mkdir(parents=True)
            tensors = {
                key: torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02, generator=generator).cpu()
                for key, shape in shapes.items()
            }
            save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
            model.peft_config["default"].save_pretrained(out)
