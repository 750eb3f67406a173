"""A checkpoint and adapters with random numbers, written once; nothing is downloaded."""

import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
    generator = torch.Generator(device).manual_seed(0)

    def values(parameter: torch.nn.Parameter) -> torch.Tensor:
        made = torch.ones(parameter.shape, dtype=dtype, device=device)
        if parameter.ndim > 1:
            made.normal_(std=config.initializer_range, generator=generator)
        return made.cpu()

    def write(parameters: Mapping[str, torch.nn.Parameter], path: Path) -> None:
        save_file({name: values(parameter) for name, parameter in parameters.items()}, path, {"format": "pt"})

    _write_checkpoint(config, folder, dtype, write)


def write_sparse_model(config: PretrainedConfig, folder: Path) -> None:
    """A checkpoint in bf16 whose data are holes of the file system: it reads as zeros, and takes no room on disk."""
    _write_checkpoint(config, folder, torch.bfloat16, _write_hole)


def _write_checkpoint(
    config: PretrainedConfig,
    folder: Path,
    dtype: torch.dtype,
    write: Callable[[Mapping[str, torch.nn.Parameter], Path], None],
) -> None:
    """Files by ``write``, their index and the configuration."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    for number, parameters in enumerate(_shards(model)):
        file = f"model-{number:05d}.safetensors"
        write(parameters, folder / file)
        index |= dict.fromkeys(parameters, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)


def _shards(model: torch.nn.Module) -> Iterator[Mapping[str, torch.nn.Parameter]]:
    """Parameters by file, as real checkpoints have them: a machine with less memory could not map one of 141 GB."""
    shard: dict[str, torch.nn.Parameter] = {}
    num_bytes = 0
    for name, parameter in model.named_parameters():
        shard[name] = parameter
        num_bytes += parameter.nbytes
        if num_bytes > _SHARD_BYTES:
            yield shard
            shard, num_bytes = {}, 0
    if shard:
        yield shard


def _write_hole(parameters: Mapping[str, torch.nn.Parameter], path: Path) -> None:
    """A file that has its header alone."""
    header, end = {}, 0
    for name, parameter in parameters.items():
        start, end = end, end + parameter.nbytes
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)


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
