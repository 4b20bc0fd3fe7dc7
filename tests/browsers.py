"""A real browser, and a real TensorBoard to look at with it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no browser on this machine: Debian's is installed by `apt-get install chromium`"
)

# Software rendering: TensorBoard draws its curves with WebGL, and the machines of CI have no GPU.
_ARGUMENTS = ("--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
_SECONDS_TO_START = 60


class Watched:
    """A page, and everything that went wrong on it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def texts(self, selector: str) -> list[str]:
        """What each element shows, with what stands in shadow roots beneath it, of which TensorBoard is made."""
        found: list[str] = self.page.locator(selector).evaluate_all(_TEXTS)
        return [" ".join(text.split()) for text in found]


_TEXTS = """elements => {
  const text = node => {
    if (node.nodeType === Node.TEXT_NODE) return node.data;
    if (["STYLE", "SCRIPT", "TEMPLATE"].includes(node.nodeName)) return "";
    const within = node.nodeName === "SLOT" ? node.assignedNodes() : (node.shadowRoot || node).childNodes;
    return Array.from(within).map(text).join(" ");
  };
  return elements.map(text);
}"""


@contextmanager
def browser_page(**settings: Any) -> Iterator[Watched]:
    """A page in a headless browser; ``settings`` are those of Playwright's ``new_page``."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=list(_ARGUMENTS))
        try:
            yield Watched(browser.new_page(**{"viewport": {"width": 1600, "height": 1000}, **settings}))
        finally:
            browser.close()


@contextmanager
def tensorboard_server(logdir: Path) -> Iterator[str]:
    """The address of a TensorBoard that has read ``logdir``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1"]
    server = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    try:
        yield _once_read(f"http://127.0.0.1:{port}", server)
    finally:
        server.terminate()
        server.wait(10)


def _once_read(address: str, server: subprocess.Popen[bytes]) -> str:
    """The address, once the server has read a run."""
    deadline = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < deadline:
        assert server.poll() is None, "TensorBoard did not start"
        try:
            with urllib.request.urlopen(f"{address}/data/runs", timeout=5) as answer:
                if answer.read().strip() not in (b"", b"[]"):
                    return address
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.3)
    raise AssertionError("TensorBoard read no run in time")
