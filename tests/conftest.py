"""What all tests share: golden texts."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, which has to be chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

GoldenCheck = Callable[[str, str], None]


# The same examples in each run; the nightly one draws new ones. Tests that say how many they want keep that number.
hypothesis.settings.register_profile("bdlora", max_examples=30, derandomize=True, deadline=None)
hypothesis.settings.register_profile("bdlora-nightly", max_examples=500, deadline=None, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-goldens", action="store_true", help="write what the tests find into the golden files (make golden)"
    )
    parser.addoption(
        "--nightly",
        action="store_true",
        help="hundreds of new random examples instead of a few, and what takes minutes (make nightly)",
    )
    parser.addoption("--screenshots", help="folder for screenshots of the inspector (make screenshots)")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("bdlora-nightly" if config.getoption("--nightly") else "bdlora")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests have a time limit of their own are the long ones: they start first, so that none runs alone."""
    long_files = {item.path for item in items if item.get_closest_marker("timeout") is not None}
    items.sort(key=lambda item: item.path not in long_files)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> GoldenCheck:
    """``golden(name, text)``: the text is that of the file ``goldens/<name>.txt`` beside the test."""
    folder = Path(request.path).parent / "goldens"

    def check(name: str, text: str) -> None:
        path = folder / f"{name}.txt"
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        expected = path.read_text() if path.is_file() else ""
        if text != expected:
            lines = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), f"{path.name} (golden)", "found", lineterm=""
            )
            pytest.fail("\n".join([*lines, "", "if the change is meant: make golden, then read the diff in git"]))

    return check
