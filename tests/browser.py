"""A headless Chromium for tests of pages: DevTools messages over two pipes, without another package."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, "Tab": 9, "1": 49, "2": 50, "3": 51}


class Browser:
    """One browser with one page. `profile`: folder of what it remembers, such as localStorage, and of its downloads."""

    def __init__(self, profile: Path):
        self.profile, self.downloads, self.last = profile, profile / "downloads", 0
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        (theirs, self.out), (self.into, theirs2) = os.pipe(), os.pipe()

        def pipes() -> None:  # the browser reads file 3 and writes file 4
            kept = os.dup(theirs), os.dup(theirs2)
            os.dup2(kept[0], 3)
            os.dup2(kept[1], 4)

        command = [CHROMIUM, *flags, "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen(command, close_fds=False, preexec_fn=pipes, stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(theirs2)
        self.session, self.buffer = None, b""
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session = None
        self.call("Browser.close")
        self.process.wait(20)
        os.close(self.out)
        os.close(self.into)

    def read(self) -> dict:
        while b"\0" not in self.buffer:
            part = os.read(self.into, 1 << 20)
            assert part, "the browser has ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, until: str | None = None, **parameters):
        """Send a message; returns its answer, after an event `until` has come."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        answer, come = None, until is None
        while answer is None or not come:
            found = self.read()
            come = come or found.get("method") == until
            if found.get("id") == self.last:
                assert "error" not in found, found
                answer = found["result"]
        return answer

    def open(self, path: Path) -> None:
        self.call("Page.navigate", until="Page.loadEventFired", url=path.as_uri())

    def reload(self) -> None:
        self.call("Page.reload", until="Page.loadEventFired")

    def press(self, *keys: str) -> None:
        for key in keys:
            code = {"windowsVirtualKeyCode": KEYS[key]}
            text = {"text": {"Enter": "\r"}.get(key, key)} if key in ("Enter", "1", "2", "3") else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **code, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def run(self, script: str):
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
