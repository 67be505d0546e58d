"""A real Chromium without a window, driven over the WebDriver protocol by Debian's chromedriver.

with browser() as page:
    page.open(path.as_uri())
    page.press("/")
    assert page.run("return document.title") == "…"
"""

import base64
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from tenacity import retry, stop_after_delay, wait_fixed

KEYS = {"Left": "\ue012", "Right": "\ue014", "Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004"}
# Chromium calls home unless it is told not to; it reaches this machine and nothing else.
_ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class Page:
    """The one window of a session."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, address: str) -> None:
        self._post("url", url=address)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript; return what it returns."""
        return self._post("execute/sync", script=script, args=list(arguments))

    def press(self, key: str) -> None:
        """Press and release a key: a character, or a name in `KEYS`."""
        value = KEYS.get(key, key)
        actions = [{"type": kind, "value": value} for kind in ("keyDown", "keyUp")]
        self._post("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def click(self, selector: str) -> None:
        """Click the first element of a CSS selector where a person would."""
        found = self._post("element", using="css selector", value=selector)
        self._post(f"element/{next(iter(found.values()))}/click")

    @retry(stop=stop_after_delay(20), wait=wait_fixed(0.05), reraise=True)
    def wait(self, script: str) -> None:
        """Wait until an expression is true."""
        assert self.run(f"return Boolean({script})"), script

    def screenshot(self, path: Path) -> None:
        answer = requests.get(f"{self._session}/screenshot", timeout=60)
        path.write_bytes(base64.b64decode(answer.json()["value"]))

    def errors(self) -> list[str]:
        """Return what the console has complained of since the last call."""
        entries = self._post("se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def _post(self, path: str, **body: Any) -> Any:
        answer = requests.post(f"{self._session}/{path}", json=body, timeout=60).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer


@contextmanager
def browser(width: int = 1400, height: int = 1000) -> Iterator[Page]:
    """Start Chromium; skip the test where there is none."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not chromium:
        pytest.skip("chromium and chromedriver are not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as profile:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            session = _session(f"http://127.0.0.1:{port}", chromium, profile, (width, height))
            try:
                yield Page(session)
            finally:
                requests.delete(session, timeout=60)
        finally:
            process.terminate()
            process.wait(20)


@retry(stop=stop_after_delay(30), wait=wait_fixed(0.1), reraise=True)
def _session(server: str, chromium: str, profile: str, size: tuple[int, int]) -> str:
    arguments = [*_ARGUMENTS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
    wanted = {
        "browserName": "chrome",
        "goog:chromeOptions": {"binary": chromium, "args": arguments},
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    answer = requests.post(f"{server}/session", json={"capabilities": {"alwaysMatch": wanted}}, timeout=60).json()
    assert "sessionId" in answer["value"], answer
    return f"{server}/session/{answer['value']['sessionId']}"
