"""A headless Chromium, driven through its debugging protocol."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-port=0 "
    "--disable-background-timer-throttling --disable-renderer-backgrounding --disable-backgrounding-occluded-windows"
)


class Browser:
    """Open pages in one Chromium; a context."""

    def __init__(self, folder: Path):
        self._process = subprocess.Popen(
            [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        told = folder / "DevToolsActivePort"
        self._port = wait_for(lambda: told.exists() and told.read_text().split()[0], 60)

    def open(self, address: str) -> "Page":
        """Open a page in a new tab."""
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}/json/new?{address}", method="PUT")
        with urllib.request.urlopen(request) as answer:
            return Page(json.load(answer)["webSocketDebuggerUrl"])

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *exception) -> None:
        self._process.kill()
        self._process.wait()


class Page:
    """A tab."""

    def __init__(self, address: str):
        from tornado.websocket import websocket_connect

        async def connect():
            return await websocket_connect(address, max_message_size=2**28)

        self._loop = asyncio.new_event_loop()
        self._socket = self._loop.run_until_complete(connect())
        self._number = 0
        self.events = []  # of the domains that were enabled, as (method, params)

    def call(self, method: str, **params):
        """Call a method of the protocol and return its result."""
        self._number += 1
        message = json.dumps({"id": self._number, "method": method, "params": params})
        return self._loop.run_until_complete(self._ask(message))

    async def _ask(self, message: str):
        await self._socket.write_message(message)
        while True:
            answer = json.loads(await self._socket.read_message())
            if answer.get("id") == self._number:
                return answer["result"]
            if "method" in answer:
                self.events.append((answer["method"], answer["params"]))

    def go_to(self, address: str) -> None:
        """Load an address, and record requests, console messages and exceptions in `events` from now on."""
        for domain in ("Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.wait_for(f"location.href === {address!r} && document.readyState === 'complete'", 30)

    def js(self, expression: str):
        """Evaluate JavaScript on the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def move_slider(self, selector: str, value: int) -> None:
        """Move a range input as a visitor does."""
        self.call("Page.bringToFront")
        self.js(
            f"{{ const s = document.querySelector({selector!r}); s.value = {value};"
            "s.dispatchEvent(new Event('input', {bubbles: true}));"
            "s.dispatchEvent(new Event('pointerup', {bubbles: true})) }"
        )

    def type_into(self, selector: str, text: str) -> None:
        """Replace the text of an input as a visitor does, who types again where the page took it back."""
        self.call("Page.bringToFront")  # only the tab in front has the focus
        field = f"document.querySelector({selector!r})"

        def typed() -> bool:
            self.js(f"{field}.focus()")
            time.sleep(0.3)  # the page may set the text anew when it gets the focus
            self.js(f"{field}.select()")
            self.call("Input.insertText", text=text)
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)
            time.sleep(0.3)
            return self.js(f"{field}.value") == text

        wait_for(typed, 60)

    def wait_for(self, expression: str, seconds: float = 300):
        """Wait until a JavaScript expression is true and return it."""
        try:
            return wait_for(lambda: self.js(expression), seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{expression}: {error}; the page says\n{self.js('document.body.innerText')}") from None

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


def wait_for(ask, seconds: float):
    """Ask until the answer is true and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := ask():
            return answer
        time.sleep(0.2)
    raise TimeoutError(f"not true after {seconds} s")
