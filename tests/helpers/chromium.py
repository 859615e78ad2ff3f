"""A headless Chromium driven over its DevTools pipe: no port, no driver, no package beyond the standard library.

Used by the tests/nightly/test_*_browser.py; methods are named as in the DevTools protocol. A picture of a report:

python -m tests.helpers.chromium RUN/report.html picture.png --width 390 --height 844 --dark
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 120.0  # how long an answer may take on a busy machine

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-pipe"),
]


class Chromium:
    """One browser with one tab and a new profile below `directory`; a context manager."""

    def __init__(self, directory: Path) -> None:
        read_there, write_here = _pipe()
        read_here, write_there = _pipe()
        # The browser reads commands from its file descriptor 3 and writes answers to 4.
        shell = f'exec "$@" 3<&{read_there} 4>&{write_there}'
        command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={directory / 'profile'}", "about:blank"]
        self._log = (directory / "chromium.log").open("wb")
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(read_there, write_there),
            stdout=self._log,
            stderr=self._log,
        )
        os.close(read_there)
        os.close(write_there)
        self._to, self._from = write_here, read_here
        self._unread = b""
        self._calls = 0
        self.events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._log.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the tab answers; raises RuntimeError with its error."""
        return self._call(method, parameters, self._session)

    def open(self, file: Path, width: int, *, dark: bool, height: int = 900) -> None:
        """As `visit`, of a file."""
        self.visit(file.as_uri(), width, dark=dark, height=height)

    def visit(self, url: str, width: int, *, dark: bool, height: int = 900) -> None:
        """Loads an address in a window of this size (CSS pixels), with `events` from then on; RuntimeError without
        it."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        if error := self.call("Page.navigate", url=url).get("errorText"):
            raise RuntimeError(f"{url}: {error}")
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression in the page, whatever its content security policy."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression[:80]}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def screenshot(self, *, whole_page: bool = False) -> bytes:
        """A PNG of the window, or of the whole page."""
        clip = self._clip(whole_page)
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole_page, **clip)["data"])

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF")["data"])

    def _clip(self, whole_page: bool) -> dict[str, Any]:
        if not whole_page:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def _call(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        data = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._calls:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        """The next message; an event is kept in `events`, too. Raises RuntimeError with the log when none comes."""
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._from, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError(f"Chromium said nothing more: {Path(self._log.name).read_text(errors='replace')}")
            self._unread += data
        text, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are above 9, out of the way of the browser's own 3 and 4."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]


def main() -> None:
    """Writes a PNG of the top of a page; without --height of the whole page."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1200, help="CSS pixels")
    parser.add_argument("--height", type=int, help="CSS pixels")
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mipo-ray-chromium-") as directory, Chromium(Path(directory)) as browser:
        browser.open(options.page.resolve(), options.width, dark=options.dark, height=options.height or 900)
        options.picture.write_bytes(browser.screenshot(whole_page=options.height is None))


if __name__ == "__main__":
    main()
