"""A headless Chromium, driven by its DevTools protocol over two pipes: no package, no port, nothing of the user's.

with browser(folder) as chromium:
    page = chromium.open("http://127.0.0.1:30001/")
    page.wait("document.title == 'emily'")
    page.screenshot(Path("page.png"))
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
MISSING = "no browser: install Debian's package chromium"
_AT_3_AND_4 = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3])
os.dup2(commands, 3), os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Starts the browser with its two pipes where it expects them."""
PATIENCE = 60.0
"""Seconds for one answer or condition, also on a machine under load."""


def program() -> str | None:
    """Return the browser's path; None without a browser."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Browser:
    """A running browser; use `browser`."""

    def __init__(self, folder: Path) -> None:
        """folder: for its profile."""
        read_end, self._commands = os.pipe()
        self._answers, write_end = os.pipe()
        flags = (
            "headless=new",
            "no-sandbox",
            "disable-gpu",
            "disable-dev-shm-usage",
            "no-first-run",
            "hide-scrollbars",
        )
        arguments = [f"--{flag}" for flag in (*flags, "remote-debugging-pipe", f"user-data-dir={folder}")]
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _AT_3_AND_4,
                str(read_end),
                str(write_end),
                str(program()),
                *arguments,
                "about:blank",
            ],
            pass_fds=(read_end, write_end),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read_end)
        os.close(write_end)
        self._number = 0
        self._waiting: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self.events: list[dict[str, Any]] = []
        """Everything that it reported, in order."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        rest = b""
        while piece := os.read(self._answers, 65536):
            *messages, rest = (rest + piece).split(b"\0")
            for message in map(json.loads, messages):
                if (waiting := self._waiting.pop(message.get("id", 0), None)) is not None:
                    waiting.put(message)
                else:
                    self.events.append(message)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Give a command; return its result."""
        self._number += 1
        number, waiting = self._number, queue.SimpleQueue[dict[str, Any]]()
        self._waiting[number] = waiting
        command = {"id": number, "method": method, "params": parameters}
        if session is not None:
            command["sessionId"] = session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        answer = waiting.get(timeout=PATIENCE)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def open(
        self, address: str, *, width: int = 1280, height: int = 900, dark: bool = False, scripts: bool = True
    ) -> Tab:
        """Open an address in a window of this size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.resize(width, height)
        tab.dark(dark)
        if not scripts:
            tab.call("Emulation.setScriptExecutionDisabled", value=True)
        tab.call("Page.navigate", url=address)
        tab.wait("document.readyState == 'complete'")
        return tab

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError, AssertionError, queue.Empty):
            self.call("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._commands)
        self._reader.join(10)
        os.close(self._answers)


class Tab:
    """One open page."""

    def __init__(self, chromium: Browser, session: str) -> None:
        self._browser = chromium
        self._session = session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Give a command to this page."""
        return self._browser.call(method, self._session, **parameters)

    def run(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = PATIENCE) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(f"Boolean({condition})")):
            assert time.monotonic() < deadline, f"{condition}: {value!r}\n{self.text()}"
            time.sleep(0.05)

    def text(self) -> str:
        """Return all visible text."""
        return str(self.run("document.body.innerText"))

    def resize(self, width: int, height: int) -> None:
        """Give the window another size, in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, dark: bool) -> None:
        """Let the page believe that the person wants dark colours, or light ones."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write a picture of the page, whole or as far as the window shows it."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def troubles(self) -> list[str]:
        """Return every error that the browser reported, such as a script's or a violation of the page's policy."""
        mine = [event for event in self._browser.events if event.get("sessionId") == self._session]
        found = [event["params"] for event in mine if event["method"] == "Runtime.exceptionThrown"]
        logged = [event["params"]["entry"] for event in mine if event["method"] == "Log.entryAdded"]
        return [str(each) for each in found] + [str(each) for each in logged if each["level"] == "error"]

    def requests(self) -> list[str]:
        """Return the address of every request so far."""
        return [
            event["params"]["request"]["url"]
            for event in self._browser.events
            if event.get("sessionId") == self._session and event["method"] == "Network.requestWillBeSent"
        ]


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Run a browser while the block runs. folder: a new one, for its profile."""
    chromium = Browser(folder)
    try:
        yield chromium
    finally:
        chromium.close()
