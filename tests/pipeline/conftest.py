"""Pages in a real browser, and the plug-in backbone of the documentation."""

import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest

EXAMPLE = re.search(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/backbones.md").read_text(encoding="utf-8"), re.DOTALL
)[1]
"""A backbone of one's own, as the documentation has it."""
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
LONG = 60_000
"""Milliseconds that a busy machine may take for a step; nothing waits that long where all is well."""


@pytest.fixture(scope="module")
def chromium():
    """Chromium of this machine, as Debian's package and others install it."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Open a page; every error that it meets, and every request to another place, fails the test."""
    wrong, contexts = [], []

    def open_page(address, **options):
        context = chromium.new_context(viewport={"width": 1200, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(LONG)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        # A refusal is an error on the console by itself.
        page.on(
            "console", lambda one: one.type == "error" and "status of 422" not in one.text and wrong.append(one.text)
        )
        page.on("request", lambda one: one.url.startswith((address, "data:")) or wrong.append(one.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def mynet(tmp_path, monkeypatch):
    """Puts the documented plug-in where it is found, changed or not; without a change to make, takes it away."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    # Two versions of one second would have the same.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def put(old="", new=""):
        assert old in EXAMPLE
        (folder / "mynet.py").write_text(EXAMPLE.replace(old, new) if old else EXAMPLE)
        forget()

    def forget():
        importlib.invalidate_caches()
        sys.modules.pop("mynet", None)

    put()
    yield put
    (folder / "mynet.py").unlink(missing_ok=True)
    forget()
