"""Headless Chromium for tests: Debian's, without a network, driven by playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", Path(__file__).parent.parent / "build/screenshots"))
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Visit:
    """A page, and what it did: requests, and what it complained of."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self._heard(message.type, message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self._heard("error", f"dialog: {dialog.message}"))

    def _heard(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def open(self, address: str) -> None:
        """Go there and wait until all is shown."""
        self.page.goto(address)
        self.page.wait_for_selector("body[data-ready=yes]", timeout=30_000)

    def picture(self, name: str) -> None:
        """A screenshot of the whole page, for people to look at."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    def painted(self) -> dict[str, int]:
        """Title of each panel -> pixels of its canvas in a colour of its lines."""
        found: dict[str, int] = self.page.evaluate(PAINTED)
        return found


PAINTED = """() => Object.fromEntries(Report.curves.panels.map(({ plot, kind }) => {
  const canvas = plot.root.querySelector("canvas");
  // A copy: reading the page's own canvas again and again makes the browser complain.
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [canvas.width, canvas.height];
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  const { data } = context.getImageData(0, 0, copy.width, copy.height);
  const colors = plot.series.slice(1).map((series) => series.stroke(plot, 1).match(/\\d+/g).slice(0, 3).map(Number));
  let count = 0;
  for (let place = 0; place < data.length; place += 4) {
    const near = (color) => color.every((part, channel) => Math.abs(part - data[place + channel]) < 12);
    if (data[place + 3] > 200 && colors.some(near)) count++;
  }
  return [kind.title, count];
}))"""


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser with an empty profile; `new_page` of it takes playwright's options."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(profile),
            executable_path=CHROMIUM,
            headless=True,
            args=list(FLAGS),
            viewport={"width": 1400, "height": 1000},
            offline=False,
        )
        try:
            yield context
        finally:
            context.close()
