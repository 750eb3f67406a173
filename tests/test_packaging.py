"""The package as users get it: its entry point, and modules that exist once."""

import ast
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).parent.parent
_SOURCES = ("bdlora_compile", "passes", "runtime", "tests", "examples")


def test_backend_is_registered() -> None:
    """`backend="bdlora"` needs no import."""
    names = [point.name for point in entry_points(group="torch_dynamo_backends")]
    assert "bdlora" in names


def test_linked_folders_are_imported_through_the_package_only() -> None:
    """A module imported as `passes.x` and as `bdlora_compile.passes.x` would exist twice."""
    for folder in _SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
                assert not any(name.split(".")[0] in ("passes", "runtime") for name in names), path


def test_help_teaches() -> None:
    """`bdlora run --help` shows an example."""
    command = [sys.executable, "-c", "from bdlora_compile.cli import app; app()", "run", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "Example:" in done.stdout
