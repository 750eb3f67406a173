"""Tensors of an adapter where they lie, in a file (`adapter_weights`) or in memory: views of them, none copied."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Protocol

import torch

from bdlora_compile.errors import AdapterError
from bdlora_compile.runtime.adapter_fields import short

DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
)
"""What may be stored, by the names of safetensors; PEFT writes float32 unless told otherwise."""


class TensorSource(Protocol):
    """A matrix that stays where it is until it is needed."""

    @property
    def name(self) -> str:
        """Name of the tensor in its adapter."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Whole shape, known without reading."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Stored type, one of float32, float16, bfloat16 and float64."""
        ...

    @property
    def where(self) -> str:
        """What messages call it: its name and that of its adapter."""
        ...

    def view(self) -> torch.Tensor:
        """All of it, in memory of the CPU and in the stored type, neither copied nor checked: for reading at once.

        Raises:
            AdapterError: the file is not the one that was checked.
        """
        ...


def check_finite(source: TensorSource) -> None:
    """Look at all values of a tensor.

    Raises:
        AdapterError: it holds NaN or infinity, which would spread to all tokens of its rows.
    """
    tensor = source.view()
    if not is_finite(tensor):
        raise AdapterError(
            f"tensor {source.where}",
            found=f"{int((~torch.isfinite(tensor)).sum())} values that are NaN or infinite",
            expected="finite numbers",
            remedy="train the adapter again from a checkpoint before it diverged",
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: the least and the largest tell, 20 times faster than asking each."""
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


@dataclass(frozen=True, slots=True)
class MemoryTensor:
    """A tensor in memory: a view sees what was written to it by then."""

    name: str
    tensor: torch.Tensor = field(repr=False)
    source: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def where(self) -> str:
        return f"{self.name} of {self.source}"

    def view(self) -> torch.Tensor:
        return self.tensor.detach().cpu()


def memory_tensors(tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, TensorSource]:
    """The tensors of a model in memory by name, not copied.

    Raises:
        AdapterError: a tensor has a type or a storage that cannot be served.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise dtype_error(source, name, str(tensor.dtype))
        if tensor.is_meta or tensor.layout != torch.strided:
            raise AdapterError(
                f"{source}: tensor {short(name)}",
                found="a tensor without dense values (on the meta device, or sparse)",
                expected="a dense tensor with values",
                remedy="load the adapter's weights first",
            )
    return {name: MemoryTensor(name, tensor, source) for name, tensor in tensors.items()}


def dtype_error(source: str, name: str, dtype: str) -> AdapterError:
    """A type that cannot be served."""
    return AdapterError(
        f"{source}: tensor {short(name)}",
        found=f"dtype {dtype}",
        expected="float32, float16, bfloat16 or float64",
        remedy="convert it to float32 and save the adapter again",
    )
