"""Opens pages in headless Chromium, as a reader would, over the protocol that its developer tools use.

    with Browser(folder) as browser:
        browser.open(path)
        browser.run("document.title")
        browser.press("ArrowLeft")

It talks through pipes, so that no port is open and no other package is needed.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time

COMMAND = shutil.which("chromium") or shutil.which("google-chrome")
#: Keys as the protocol names them: their code, and the text that they type.
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowUp": 38, "ArrowDown": 40, "Escape": 27, "Tab": 9, "Enter": 13}


class Browser:
    """One browser with one page. `errors` has what it said on its console, and `fetched` what it asked for."""

    def __init__(self, folder, seconds=60):
        self.errors, self.fetched, self.seconds, self.number = [], [], seconds, 0
        self.seen = []
        down, self.out = os.pipe()
        self.inward, up = os.pipe()

        def place_pipes():
            """The browser reads from 3 and writes to 4. What lies there already is moved away first."""
            free = [os.dup(down), os.dup(up)]
            while min(free) < 5:
                free = [os.dup(fd) for fd in free]
            os.dup2(free[0], 3), os.dup2(free[1], 4)

        self.process = subprocess.Popen(
            [
                *(COMMAND, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
                *(f"--user-data-dir={folder}", "--disable-background-networking", "about:blank"),
            ],
            preexec_fn=place_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(down), os.close(up)
        self.buffer, self.session = b"", None

    def __enter__(self):
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        os.close(self.out)
        self.process.terminate()
        self.process.wait(30)
        os.close(self.inward)

    def call(self, method, **parameters):
        """Ask for something, and wait for the answer."""
        self.number += 1
        number = self.number
        request = {"id": number, "method": method, "params": parameters}
        request |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(request).encode() + b"\0")
        while (answer := self.read()).get("id") != number:
            self.note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def read(self):
        until = time.monotonic() + self.seconds
        while b"\0" not in self.buffer:
            if time.monotonic() > until:
                raise TimeoutError("the browser does not answer")
            part = os.read(self.inward, 2**20)
            if not part:
                raise RuntimeError("the browser has ended")
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def note(self, event):
        given = event.get("params", {})
        self.seen.append(event.get("method"))
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(given["exceptionDetails"].get("exception", given["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.errors.append([argument.get("value") for argument in given["args"]])
        elif event.get("method") == "Log.entryAdded":
            self.errors.append(given["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.fetched.append(given["request"]["url"])

    def open(self, path, width=1200, height=900, dark=False):
        """Open a page and wait until it is loaded."""
        self.errors, self.fetched, self.seen = [], [], []
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self.seen:
            self.note(self.read())
        self.settle()

    def resize(self, width, height):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def settle(self):
        """Wait until what is on its way has been drawn."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script):
        """Run a script in the page; returns its value. A promise is waited for."""
        given = {"expression": script, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", **given)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def press(self, key):
        """Press a key, as a person does."""
        code = KEYS.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            given = {"key": key, "code": key, "windowsVirtualKeyCode": code, "nativeVirtualKeyCode": code}
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, **given, **text)
        self.settle()

    def save_picture(self, path):
        """Save what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
