"""Takes a picture of a page of Ray's dashboard with headless Chromium, as those in this folder were.

    python cluster/screenshots/take.py http://127.0.0.1:8265 /jobs/instructions-1 data.png \
        --wait "Ray Data Overview" --click "Ray Data Overview" --crop "Ray Data Overview"

Needs Chromium (Debian: apt-get install chromium) and Pillow. The token is taken from RAY_AUTH_TOKEN, where it is set.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

SECONDS = 60  # for the browser to start, and for each thing on the page to appear
COLOURS = 64
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
    ),
)
# The smallest element that shows the text, or whose title is it.
FIND = """
((text) => [...document.querySelectorAll("body *")]
    .filter((element) => element.textContent.includes(text) || element.getAttribute("title")?.startsWith(text))
    .pop())"""


class Page:
    """A page of the browser, driven by Chromium's DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket = socket
        self._numbers = itertools.count(1)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one call; raises RuntimeError with the browser's error."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while (answer := await self._socket.receive_json()).get("id") != number:
            pass  # an event
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return dict(answer["result"])

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    async def wait(self, text: str) -> None:
        """Returns when the page shows the text; raises TimeoutError when it does not."""
        async with asyncio.timeout(SECONDS):
            while not await self.evaluate(f"!!{FIND}({json.dumps(text)})"):
                await asyncio.sleep(0.2)


async def take(options: argparse.Namespace, profile: str) -> bytes:
    """The picture, as PNG."""
    port_file = Path(profile) / "DevToolsActivePort"
    async with asyncio.timeout(SECONDS):
        while not port_file.exists() or len(port_file.read_text().splitlines()) < 2:
            await asyncio.sleep(0.1)
    browser = f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}"
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{browser}/json") as answer:
            target = next(page for page in await answer.json() if page["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            page = Page(socket)
            await page.call(
                "Emulation.setDeviceMetricsOverride",
                **{"width": options.width, "height": options.height, "deviceScaleFactor": 1, "mobile": False},
            )
            if token := os.environ.get("RAY_AUTH_TOKEN"):
                await page.call(
                    "Network.setCookie", name="ray-authentication-token", value=token, url=options.dashboard
                )
            await page.call("Page.navigate", url=f"{options.dashboard}/#{options.page}")
            for text in options.wait:
                await page.wait(text)
            for text in options.click:
                await page.wait(text)
                await page.evaluate(
                    f"{FIND}({json.dumps(text)}).dispatchEvent(new MouseEvent('click', {{bubbles: true}}))"
                )
            await asyncio.sleep(options.settle)
            clip = {}
            if options.crop:
                await page.wait(options.crop)
                top = await page.evaluate(f"{FIND}({json.dumps(options.crop)}).getBoundingClientRect().top + scrollY")
                area = {"x": 0, "y": max(0, top - 16), "width": options.width, "height": options.height, "scale": 1}
                clip = {"clip": area, "captureBeyondViewport": True}
            picture = await page.call("Page.captureScreenshot", **clip)
            return base64.b64decode(picture["data"])


def main() -> None:
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dashboard", help="http://127.0.0.1:8265")
    parser.add_argument("page", help="what comes after the #, such as /actors")
    parser.add_argument("file", type=Path, help="the PNG to write")
    parser.add_argument("--wait", action="append", default=[], help="a text that must be there first; repeatable")
    parser.add_argument("--click", action="append", default=[], help="then click on this text or title; repeatable")
    parser.add_argument("--crop", help="the picture begins above this text")
    parser.add_argument("--settle", type=float, default=3.0, help="seconds before the picture, for what is drawn late")
    parser.add_argument("--width", type=int, default=1400, help="pixels")
    parser.add_argument("--height", type=int, default=900, help="pixels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            ["chromium", *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            picture = asyncio.run(take(options, profile))
        finally:
            browser.terminate()
            browser.wait(timeout=SECONDS)
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS).save(options.file, optimize=True)
    print(f"{options.file}: {options.file.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
