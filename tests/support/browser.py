"""Pages in a real browser: a headless Chromium from PATH, driven by Playwright. Tests skip, with the reason, where one of them is missing.

`make browser` installs Chromium from Debian's packages; Playwright is in requirements-dev.txt.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
MISSING = [
    *([] if CHROMIUM else ["no Chromium on PATH (make browser)"]),
    *([] if importlib.util.find_spec("playwright") else ["no Playwright (requirements-dev.txt)"]),
]
needs_browser = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))

DESKTOP, PHONE = (1280, 800), (390, 844)
"""Width and height of a window, CSS pixels"""
PATIENCE = 120_000
"""Milliseconds that a busy machine may take for a step"""


@contextmanager
def in_browser(path: Path, size: tuple[int, int] = DESKTOP) -> Iterator[Any]:
    """A Playwright page that shows the file. At the end it must have made no request, and its console must have no warning or error.

    A picture of the whole page is kept beside the file, also where a test fails: see `screenshot_of`."""
    from playwright.sync_api import sync_playwright

    told: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=PATIENCE)
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: told.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: told.append(request.url) if request.url.startswith(("http", "ws")) else None)
        page.goto(path.as_uri())
        try:
            yield page
        finally:
            page.screenshot(path=screenshot_of(path, size), full_page=True)
            browser.close()
    assert told == []


def screenshot_of(path: Path, size: tuple[int, int] = DESKTOP) -> Path:
    """The picture of a page that `in_browser` showed last in this size."""
    return path.with_name(f"{path.stem}-{size[0]}.png")
