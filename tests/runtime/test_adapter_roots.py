"""Names from requests: what they may lead to, and every way out that is tried."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bdlora_compile.errors import AdapterError, ConfigError
from bdlora_compile.runtime.adapter_roots import AdapterRoots

FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text("x")
    return folder


@pytest.fixture
def roots(tmp_path: Path) -> tuple[AdapterRoots, Path]:
    """Two roots, an adapter in each, and one outside."""
    adapter(tmp_path / "a" / "math")
    adapter(tmp_path / "b" / "team" / "code")
    adapter(tmp_path / "outside" / "secret")
    return AdapterRoots(tmp_path / "a", tmp_path / "b"), tmp_path


def test_names_below_any_root_are_found(roots: tuple[AdapterRoots, Path]) -> None:
    found, folder = roots
    assert found.find("math") == folder / "a" / "math"
    assert found.find("team/code") == folder / "b" / "team" / "code"


BAD_NAMES = [
    "", "/", "/etc", "../outside/secret", "math/../../outside/secret", "math/..", ".", "..", "a//b", "math/", "~root",
    "%2e%2e/outside", "math\\..", "math\0", "math\n", "\uff4dath",
    "<script>", "x" * 10_000, "-rf", "a/b/c/d/e", "con:fig",
    None, 7, b"math",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:20])
def test_malformed_names_are_refused_before_the_disk_is_touched(roots: tuple[AdapterRoots, Path], name: object) -> None:
    with pytest.raises(AdapterError, match="outside the pattern") as caught:
        roots[0].find(name)  # type: ignore[arg-type]  # that is the case
    assert len(str(caught.value)) < 400


def test_a_name_that_is_nowhere_says_nothing_of_other_folders(roots: tuple[AdapterRoots, Path]) -> None:
    found, folder = roots
    with pytest.raises(AdapterError, match="no such folder below the adapter roots") as caught:
        found.find("secret")
    assert str(folder) not in str(caught.value)


def test_a_link_that_leads_out_is_as_good_as_nothing(roots: tuple[AdapterRoots, Path]) -> None:
    found, folder = roots
    (folder / "a" / "way-out").symlink_to(folder / "outside" / "secret")
    with pytest.raises(AdapterError, match="no such folder"):
        found.find("way-out")
    (folder / "a" / "way-in").symlink_to(folder / "a" / "math")
    assert found.find("way-in") == folder / "a" / "math"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.symlink_to("/etc/hostname"), "leads out"),
        (os.mkfifo, "a pipe"),
        (os.mkdir, "a pipe, a device or a folder"),
    ],
    ids=["link out", "pipe", "folder"],
)
def test_files_of_an_adapter_lie_in_the_root_and_are_plain(
    roots: tuple[AdapterRoots, Path], file: str, make: Callable[[Path], object], said: str
) -> None:
    found, folder = roots
    path = folder / "a" / "math" / file
    path.unlink()
    make(path)
    with pytest.raises(AdapterError, match=said):
        found.find("math")


def test_a_root_that_is_a_link_is_what_it_leads_to(tmp_path: Path) -> None:
    adapter(tmp_path / "real" / "math")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert AdapterRoots(tmp_path / "link").find("math") == tmp_path / "real" / "math"


def test_a_root_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        AdapterRoots(tmp_path / "nowhere")
