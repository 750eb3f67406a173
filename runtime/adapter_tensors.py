"""Tensors of an adapter that are read slice by slice, from a safetensors file or from memory.

A read copies its slice out of the mapped file, so that nothing of the file stays mapped behind a tensor. Who reads
many tensors opens the file once around them (``WeightsFile.opened``); a lone read opens it for itself, which costs
1 ms for the 1120 tensors of an 80-layer adapter. Between reads no descriptor and no mapping is held: thousands of
adapters may lie around.
"""

import math
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from bdlora_compile.errors import AdapterError
from bdlora_compile.runtime.adapter_fields import LFS_POINTER, short

_DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
)
"""What may be stored; PEFT writes float32 unless told otherwise."""

MAX_HEADER_BYTES: Final = 16_000_000
"""Of a safetensors header, which is read whole; that of 1120 tensors, 80 layers, takes 180 kB."""

_SAVE_AGAIN: Final = "copy it again, or save the adapter again with PEFT's save_pretrained"
_CONVERT: Final = (
    'if you trust it, convert it once in its folder: python -c "import torch; from safetensors.torch import save_file; '
    "w = torch.load('adapter_model.bin', map_location='cpu', weights_only=True); "
    "save_file({k: v.contiguous() for k, v in w.items()}, 'adapter_model.safetensors')\""
)


class _Slice(Protocol):
    """One tensor of an open file; safetensors ships no types for it."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: tuple[slice, slice]) -> torch.Tensor: ...


class _Handle(Protocol):
    """An open file; safetensors ships no types for it."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...


class TensorSource(Protocol):
    """A matrix whose slices are read when they are needed."""

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

    def read(self, rows: slice, cols: slice) -> torch.Tensor:
        """A contiguous copy of ``tensor[rows, cols]`` in memory of the CPU, in the stored type.

        Raises:
            AdapterError: the slice holds NaN or infinity, or the file is not the one that was checked.
        """
        ...


def check_finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return ``tensor``.

    Raises:
        AdapterError: it holds NaN or infinity, which would spread to all tokens of its rows.
    """
    if not is_finite(tensor):
        raise AdapterError(
            f"tensor {name}",
            found=f"{int((~torch.isfinite(tensor)).sum())} values that are NaN or infinite",
            expected="finite numbers",
            remedy="train the adapter again from a checkpoint before it diverged",
        )
    return tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; a sum tells it in a fraction of the time that looking at each takes."""
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    # Large finite values may overflow the sum.
    return math.isfinite(total.item()) or bool(torch.isfinite(tensor).all())


@dataclass(frozen=True, slots=True)
class MemoryTensor:
    """A tensor in memory. It is not copied before it is read: a read sees what was written to it by then."""

    name: str
    tensor: torch.Tensor = field(repr=False)
    source: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, rows: slice, cols: slice) -> torch.Tensor:
        part = self.tensor.detach()[rows, cols].to("cpu", copy=True)
        return check_finite(part.contiguous(), f"{self.name} of {self.source}")


class WeightsFile:
    """One checked safetensors file, open only while it is read.

    It is opened once for a reading: what is compared with the file that was checked, and what safetensors maps, is one
    descriptor, whatever comes to lie at the path meanwhile. Threads may share it: a handle of safetensors only maps the
    file, and is counted under a lock.
    """

    def __init__(self, path: Path) -> None:
        """Remember which file lies at ``path`` now.

        Raises:
            AdapterError: it is missing, not a plain file, a Git LFS pointer, or not valid safetensors.
        """
        self.path = path
        self._lock = threading.Lock()
        self._users = 0
        self._handle: _Handle | None = None
        self._descriptor = -1
        with _descriptor_of(path) as descriptor:
            self._identity = _identity(descriptor)
            _check_head(descriptor, path)

    @contextmanager
    def opened(self) -> Iterator[_Handle]:
        """Keep the file open for all reads inside; may be nested.

        Raises:
            AdapterError: the file was replaced or written to after it was checked, or is written to while it is read.
        """
        handle = self._acquire()
        try:
            yield handle
            self._require_unchanged(self._descriptor)
        finally:
            self._release()

    def _acquire(self) -> _Handle:
        with self._lock:
            if self._handle is None:
                with _descriptor_of(self.path) as descriptor:
                    self._require_unchanged(descriptor)
                    self._handle = self._map(descriptor)
                    self._descriptor = os.dup(descriptor)
            self._users += 1
            return self._handle

    def _release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._handle = None  # safetensors unmaps the file when its last reference goes
                os.close(self._descriptor)

    def _require_unchanged(self, descriptor: int) -> None:
        # A file that shrinks below its mapping kills the process when it is read; a changed one holds other weights.
        if _identity(descriptor) != self._identity:
            raise AdapterError(
                str(self.path),
                found="another file than the one that was checked",
                expected="an unchanged file",
                remedy="load the adapter again; put a new one in its place by renaming, not by writing over it",
            )

    def _map(self, descriptor: int) -> _Handle:
        try:
            return cast(_Handle, safe_open(_name_of(descriptor, self.path), framework="pt"))
        except (SafetensorError, OSError) as error:
            raise AdapterError(
                str(self.path),
                found=f"no valid safetensors ({str(error)[:300]})",
                expected="a whole safetensors file",
                remedy=_SAVE_AGAIN,
            ) from error


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of a safetensors file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: WeightsFile = field(repr=False)

    def read(self, rows: slice, cols: slice) -> torch.Tensor:
        with self.file.opened() as handle:
            # safetensors returns a view of the mapping: it is copied before the mapping goes.
            part = handle.get_slice(self.name)[rows, cols].clone(memory_format=torch.contiguous_format)
        return check_finite(part, f"{self.name} of {self.file.path}")


def find_weights(folder: Path) -> WeightsFile:
    """The weights in the folder of an adapter.

    Raises:
        AdapterError: there is no ``adapter_model.safetensors``, or it is damaged.
    """
    path = folder / "adapter_model.safetensors"
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise AdapterError(
            str(folder / "adapter_model.bin"),
            found="weights in a pickle, which can run code when it is read",
            expected="adapter_model.safetensors",
            remedy=_CONVERT,
        )
    return WeightsFile(path)


def file_tensors(file: WeightsFile) -> dict[str, TensorSource]:
    """All tensors of a file by name, none of them read.

    Raises:
        AdapterError: the file is damaged, or a tensor has a type that cannot be served.
    """
    tensors: dict[str, TensorSource] = {}
    with file.opened() as handle:
        for name in handle.keys():  # noqa: SIM118 - a handle of safetensors cannot be iterated
            part = handle.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                raise _dtype_error(str(file.path), name, part.get_dtype())
            tensors[name] = FileTensor(name, tuple(part.get_shape()), dtype, file)
    return tensors


def memory_tensors(tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, TensorSource]:
    """The tensors of a model in memory by name, not copied.

    Raises:
        AdapterError: a tensor has a type or a storage that cannot be served.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values():
            raise _dtype_error(source, name, str(tensor.dtype))
        if tensor.is_meta or tensor.layout != torch.strided:
            raise AdapterError(
                f"{source}: tensor {short(name)}",
                found="a tensor without dense values (on the meta device, or sparse)",
                expected="a dense tensor with values",
                remedy="load the adapter's weights first",
            )
    return {name: MemoryTensor(name, tensor, source) for name, tensor in tensors.items()}


def _dtype_error(source: str, name: str, dtype: str) -> AdapterError:
    return AdapterError(
        f"{source}: tensor {short(name)}",
        found=f"dtype {dtype}",
        expected="float32, float16, bfloat16 or float64",
        remedy="convert it to float32 and save the adapter again",
    )


@contextmanager
def _descriptor_of(path: Path) -> Iterator[int]:
    """A plain file, open for reading.

    Raises:
        AdapterError: it is missing, or no plain file.
    """
    try:
        # A pipe that nobody writes to must not hold up the reader.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise AdapterError(
                str(path), found="a pipe, a device or a folder", expected="a plain file", remedy=_SAVE_AGAIN
            )
        yield descriptor
    finally:
        os.close(descriptor)


def _identity(descriptor: int) -> tuple[int, int, int, int]:
    """What tells a file from another one, and from itself after it was written to."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _name_of(descriptor: int, path: Path) -> Path:
    """A name that opens the file of a descriptor; ``path`` where the system has none."""
    own = Path("/proc/self/fd") / str(descriptor)
    return own if own.exists() else path


def _check_head(descriptor: int, path: Path) -> None:
    """What the first bytes tell, before a reader takes them at their word."""
    head = os.pread(descriptor, len(LFS_POINTER), 0)
    if head == LFS_POINTER:
        raise AdapterError(
            str(path),
            found="a Git LFS pointer",
            expected="the file itself",
            remedy="run `git lfs pull` in its repository",
        )
    size = int.from_bytes(head[:8], "little")
    if size > MAX_HEADER_BYTES:
        raise AdapterError(
            str(path),
            found=f"no valid safetensors (a header of {size} bytes)",
            expected=f"a whole safetensors file with a header of at most {MAX_HEADER_BYTES} bytes",
            remedy=_SAVE_AGAIN,
        )


def _unreadable(path: Path, error: OSError) -> AdapterError:
    return AdapterError(
        str(path),
        found=f"nothing readable ({error.strerror})",
        expected="the weights of a PEFT adapter",
        remedy="give the folder that PEFT's save_pretrained wrote",
    )
