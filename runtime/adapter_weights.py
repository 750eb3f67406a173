"""The weights of an adapter on disk: one safetensors file, mapped while it is read.

Between readings no descriptor and no mapping is held: thousands of adapters may lie around.
"""

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from bdlora_compile.errors import AdapterError
from bdlora_compile.runtime.adapter_fields import LFS_POINTER
from bdlora_compile.runtime.adapter_tensors import DTYPES, TensorSource, dtype_error

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


class _Handle(Protocol):
    """An open file; safetensors ships no types for it."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...
    def get_tensor(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class _Reading:
    """A mapped file, a descriptor of it, and the views that were made so far: making one takes some 15 us."""

    handle: _Handle
    descriptor: int
    views: dict[str, torch.Tensor] = field(default_factory=dict)

    def view(self, name: str) -> torch.Tensor:
        if name not in self.views:
            self.views[name] = self.handle.get_tensor(name)
        return self.views[name]


class WeightsFile:
    """One checked safetensors file, open only while it is read.

    It is opened once for a reading: what is compared with the file that was checked, and what safetensors maps, is one
    descriptor, whatever comes to lie at the path meanwhile. Threads may share it.
    """

    def __init__(self, path: Path) -> None:
        """Remember which file lies at ``path`` now.

        Raises:
            AdapterError: it is missing, not a plain file, a Git LFS pointer, or not valid safetensors.
        """
        self.path = path
        self._lock = threading.Lock()
        self._users = 0
        self._reading: _Reading | None = None
        with _descriptor_of(path) as descriptor:
            self._identity = _identity(descriptor)
            _check_head(descriptor, path)

    @contextmanager
    def opened(self) -> Iterator[_Reading]:
        """Keep the file mapped for all views inside; may be nested.

        Raises:
            AdapterError: the file was replaced or written to after it was checked, or is written to while it is read.
        """
        own = self._acquire()
        try:
            yield own
            self._require_unchanged(own.descriptor)
        finally:
            self._release(own)

    def tensors(self) -> dict[str, TensorSource]:
        """All tensors by name, none of them read.

        Raises:
            AdapterError: the file is damaged, or a tensor has a type that cannot be served.
        """
        with _descriptor_of(self.path) as descriptor:
            self._require_unchanged(descriptor)
            handle = self._map(descriptor)
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - it cannot be iterated
        found: dict[str, TensorSource] = {}
        for name, part in parts.items():
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None:
                raise dtype_error(str(self.path), name, part.get_dtype())
            found[name] = FileTensor(name, tuple(part.get_shape()), dtype, self)
        return found

    def _acquire(self) -> _Reading:
        with self._lock:
            if self._reading is None:
                with _descriptor_of(self.path) as descriptor:
                    self._require_unchanged(descriptor)
                    self._reading = _Reading(self._map(descriptor), os.dup(descriptor))
            self._users += 1
            return self._reading

    def _release(self, own: _Reading) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._reading = None  # the file is unmapped when the last of its views goes
                os.close(own.descriptor)

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

    @property
    def where(self) -> str:
        return f"{self.name} of {self.file.path}"

    def view(self) -> torch.Tensor:
        with self.file.opened() as reading:
            return reading.view(self.name)


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
