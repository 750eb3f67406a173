"""Help is there at once: torch takes seconds to import, and no command needs it before it runs."""

import subprocess
import sys

import pytest

import bdlora_compile as bd

COMMANDS = ("run", "serve", "explain", "diff", "calibrate")


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)], ids=str)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from bdlora_compile.cli import app; "
        f"result = CliRunner().invoke(app, [*{arguments}, '--help']); print(result.output); "
        "assert result.exit_code == 0 and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-500:]
    assert all(command in done.stdout for command in arguments or COMMANDS)


def test_every_public_name_is_there() -> None:
    """The package finds its names when they are used, and has no others."""
    for name in bd.__all__:
        assert getattr(bd, name) is not None
    assert set(bd.__all__) <= set(dir(bd))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bd.nothing  # type: ignore[attr-defined]  # what is asked
