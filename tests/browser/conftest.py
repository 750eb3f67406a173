"""A chromium of the system, and pages that fail a test when they ask the network for anything."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

Open = Callable[..., Page]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    assert executable is not None, "no chromium: apt-get install -y chromium"
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=executable, args=_FLAGS)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """``open_page(path, width, height, scheme)``; errors and requests of every page are checked at the end."""
    troubles: list[str] = []
    contexts = []

    def open_(path: Path, width: int = 1280, height: int = 720, scheme: Any = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        own = path.resolve().as_uri()
        page.on("request", lambda request: troubles.append(request.url) if not _is_own(request.url, own) else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda line: troubles.append(line.text) if line.type == "error" else None)
        page.on("dialog", lambda dialog: troubles.append(f"dialog {dialog.message}"))
        page.goto(own)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert troubles == []


def _is_own(url: str, page: str) -> bool:
    return url.split("#")[0] == page or url.startswith("data:")
