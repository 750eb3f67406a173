"""A folder that is written whole, or not at all."""

from pathlib import Path

from bdlora_compile.errors import ConfigError


def require_new(out: Path) -> None:
    """Check that nothing is in the way of a folder to write.

    Raises:
        ConfigError: something is at ``out`` already.
    """
    if out.exists():
        raise ConfigError(str(out), found="something there", expected="a new folder", remedy="move it, or name another")
