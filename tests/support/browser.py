"""A headless Chromium that lets nothing out: what a page wanted and what it complained of are kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-default-apps", "--disable-extensions",
]  # fmt: skip


@contextmanager
def browser(profile: Path) -> Iterator:
    """A playwright browser context. Skips without Chromium, but never on CI."""
    if CHROMIUM is None and not os.environ.get("CI"):
        pytest.skip("no chromium: apt-get install chromium")
    assert CHROMIUM is not None, "CI installs chromium (.ci/run)"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            str(profile), executable_path=CHROMIUM, headless=True, args=FLAGS, chromium_sandbox=False,
            viewport={"width": 1360, "height": 900}, timeout=60_000,
        )  # fmt: skip
        try:
            yield context
        finally:
            context.close()


@contextmanager
def watched(context, **media) -> Iterator:
    """(page, complaints, requests): console errors and exceptions, and every URL asked for."""
    page = context.new_page()
    page.set_default_timeout(20_000)
    if media:
        page.emulate_media(**media)
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    try:
        yield page, complaints, requests
    finally:
        page.close()
