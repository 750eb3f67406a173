"""This rank's part of the base model's weights, read slice by slice from where the whole weights lie."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from bdlora_compile.errors import ConfigError, PlacementError
from bdlora_compile.placement import Mesh, Placement, Slice, local_shape, shard_slice

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class WeightSource(Protocol):
    """Where whole weights lie, by parameter name."""

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole shape of a tensor, without reading it."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        ...

    def read_into(self, name: str, part: Slice, target: torch.Tensor) -> None:
        """Copy a slice to the start of ``target``, which is as long as the slice or, where that is padded, longer."""
        ...


class MemorySource:
    """Whole weights that are in memory already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()

    def read_into(self, name: str, part: Slice, target: torch.Tensor) -> None:
        tensor = self.read(name)
        if part.dim is None:
            target.copy_(tensor)
        else:
            length = part.stop - part.start
            target.narrow(part.dim, 0, length).copy_(tensor.narrow(part.dim, part.start, length))


class SafetensorsSource:
    """Weights of a Hugging Face folder; only the asked slice of a tensor is read.

    Raises:
        ConfigError: the folder holds no safetensors weights.
    """

    def __init__(self, folder: Path) -> None:
        self._files = _files_by_tensor(folder)

    def names(self) -> Iterable[str]:
        return self._files

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self._files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    # The file is opened for each read: its pages are mapped only while a slice is copied out of them.

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return torch.as_tensor(file.get_slice(name)[:]).clone()

    def read_into(self, name: str, part: Slice, target: torch.Tensor) -> None:
        with safe_open(self._files[name], framework="pt") as file:
            stored = file.get_slice(name)
            if part.dim is None:
                target.copy_(torch.as_tensor(stored[:]))
            else:
                index = (slice(None),) * part.dim + (slice(part.start, part.stop),)
                target.narrow(part.dim, 0, part.stop - part.start).copy_(torch.as_tensor(stored[index]))


class ShardStore:
    """The slices that one rank holds, each read once and shared by all graphs.

    Args:
        source: the whole weights.
        rank: this rank.
        mesh: the ranks that share the model.
        dtype, device: of the slices.
    """

    def __init__(self, source: WeightSource, rank: int, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> None:
        self._source = source
        self._rank = rank
        self._mesh = mesh
        self._dtype = dtype
        self._device = device
        self._held: dict[str, tuple[Placement, torch.Tensor]] = {}
        self._merged: dict[tuple[tuple[str, Placement], ...], torch.Tensor] = {}

    def get(self, name: str, placement: Placement) -> torch.Tensor:
        """This rank's slice of parameter ``name``.

        Raises:
            PlacementError: another graph of this model holds the parameter in another placement.
        """
        if name not in self._held:
            self._held[name] = (placement, self._read(name, placement))
        held, tensor = self._held[name]
        if held != placement:
            raise PlacementError(
                f"parameter {name}",
                found=f"placement {placement} in this graph and {held} in an earlier one",
                expected="one placement in all graphs of a model",
                remedy="report this with both graphs: the layout of a model is decided once",
            )
        return tensor

    def get_merged(self, parts: tuple[tuple[str, Placement], ...]) -> torch.Tensor:
        """This rank's slices of several parameters, one below the other; held in place of the parts."""
        if parts not in self._merged:
            self._merged[parts] = self._read_merged(parts)
        return self._merged[parts]

    def tensors(self) -> Iterator[torch.Tensor]:
        """All slices held."""
        yield from (tensor for _, tensor in self._held.values())
        yield from self._merged.values()

    def num_bytes(self) -> int:
        """Bytes of all slices held."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def _read_merged(self, parts: tuple[tuple[str, Placement], ...]) -> torch.Tensor:
        slices = [shard_slice(self._source.shape(name), placement, self._rank, self._mesh) for name, placement in parts]
        _, *rest = self._source.shape(parts[0][0])
        rows = [
            self._source.shape(name)[0] if part.dim is None else part.length
            for (name, _), part in zip(parts, slices, strict=True)
        ]
        merged = torch.zeros(sum(rows), *rest, dtype=self._dtype, device=self._device)
        for (name, _), part, target in zip(parts, slices, merged.split(rows), strict=True):
            self._source.read_into(name, part, target)
        return merged

    def _read(self, name: str, placement: Placement) -> torch.Tensor:
        shape = self._source.shape(name)
        part = shard_slice(shape, placement, self._rank, self._mesh)
        if part.dim is None:
            return self._source.read(name).to(dtype=self._dtype, device=self._device).contiguous()
        # Room first, then the data: a slice that is read to be copied afterwards leaves a hole as large as itself
        # between two that stay, in each layer.
        target = torch.zeros(local_shape(shape, placement), dtype=self._dtype, device=self._device)
        self._source.read_into(name, part, target)
        return target


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    if (index := folder / _INDEX).is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in sorted(weight_map.items())}
    if (single := folder / _SINGLE).is_file():
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(sorted(file.keys()), single)
    raise ConfigError(
        str(folder),
        found=f"neither {_SINGLE} nor {_INDEX}",
        expected="a Hugging Face model folder with safetensors weights",
        remedy="save the model with `save_pretrained(folder)` of a current transformers release",
    )
