"""Adapters by name from folders that an operator chose: a name from a request never leaves them."""

import os
import re
import stat
from pathlib import Path

from bdlora_compile.errors import AdapterError, ConfigError

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_PARTS = 4
_FILES = ("adapter_config.json", "adapter_model.safetensors")


class AdapterRoots:
    """Folders below which adapters may be asked for by name, searched in order.

    Args:
        roots: folders that exist; what their own names lead to is decided now.

    Raises:
        ConfigError: a root is no folder.
    """

    def __init__(self, *roots: str | Path) -> None:
        for root in roots:
            if not Path(root).is_dir():
                raise ConfigError(
                    f"adapter root {root}",
                    found="no folder",
                    expected="a folder",
                    remedy="make it, or correct its path",
                )
        self._roots = [Path(os.path.realpath(root)) for root in roots]

    def find(self, name: str) -> Path:
        """The folder of the adapter ``name`` (``owner/adapter`` for one below another folder), links resolved.

        Raises:
            AdapterError: the name is malformed, nothing is there, it lies outside of the roots, or it holds what is no
                plain file. The message does not tell paths outside of the roots apart.
        """
        parts = name.split("/") if isinstance(name, str) else []
        if not 0 < len(parts) <= _MAX_PARTS or not all(_PART.fullmatch(part) for part in parts):
            raise AdapterError(
                f"adapter name {name!r:.60}",
                found="characters, a length or parts outside the pattern",
                expected=f"up to {_MAX_PARTS} parts {_PART.pattern}, with / between them",
                remedy="give the name of a folder below an adapter root",
            )
        for root in self._roots:
            folder = _inside(root, root.joinpath(*parts))
            if folder is not None and folder.is_dir():
                _check_files(root, folder, name)
                return folder
        raise AdapterError(
            f"adapter {name!r}",
            found="no such folder below the adapter roots",
            expected=f"a folder with {' and '.join(_FILES)}",
            remedy="copy the adapter there; links may not lead out",
        )


def _inside(root: Path, path: Path) -> Path | None:
    """Where ``path`` leads, None if that is outside of ``root``."""
    real = Path(os.path.realpath(path))
    return real if real.is_relative_to(root) else None


def _check_files(root: Path, folder: Path, name: str) -> None:
    for file in _FILES:
        real = _inside(root, folder / file)
        if real is None or (real.exists() and not stat.S_ISREG(os.stat(real).st_mode)):
            raise AdapterError(
                f"adapter {name!r}: {file}",
                found="a link that leads out of the adapter root" if real is None else "a pipe, a device or a folder",
                expected="a plain file below the adapter root",
                remedy="copy the file there",
            )
