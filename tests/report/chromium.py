"""Headless Chromium, asked over its debugging pipe what it draws of a page."""

import itertools
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

FLAGS = """--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update
--disable-sync --disable-dev-shm-usage --no-first-run --remote-debugging-pipe""".split()  # noqa: SIM905
# Chromium talks on the file descriptors 3 and 4; move ours there and become it.
LAUNCH = (
    "import fcntl, os, sys; r, w = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]); "
    "os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
HIDDEN = [[0, 0, 0, 0]]
BOXES = """
[...document.querySelectorAll(SELECTOR)].map(e => {
  const b = e.getBoundingClientRect();
  return [b.width, b.height, b.left, b.top];
})"""
STICKING_OUT = """
[...document.querySelectorAll("figure > svg")].flatMap(svg => {
  const o = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("path, text, circle")].filter(e => {
    const b = e.getBoundingClientRect();
    return b.left < o.left - 1 || b.right > o.right + 1 || b.top < o.top - 1 || b.bottom > o.bottom + 1;
  }).map(e => e.textContent);
})"""
CONTRAST = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const luminance = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const linear = [...canvas.getImageData(0, 0, 1, 1).data]
      .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const ratio = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const styles = (selector) => [...document.querySelectorAll(selector)].map(e => getComputedStyle(e));
  const paper = getComputedStyle(document.body).backgroundColor;
  const text = styles("h1, .note, .label, dt").map(s => ratio(s.color, paper));
  const ticks = styles("svg text").map(s => ratio(s.fill, paper));
  const chunks = styles(".chunk").map(s => ratio(s.color, s.backgroundColor));
  const shapes = styles(".bar").map(s => ratio(s.backgroundColor, paper));
  return [Math.min(...text, ...ticks, ...chunks), Math.min(...shapes), luminance(paper)];
})()"""


class Browser:
    """One tab; `events` keeps everything the browser told us."""

    def __init__(self, binary: str, profile: Path) -> None:
        to_child, self.writer = os.pipe()
        self.reader, from_child = os.pipe()
        command = [sys.executable, "-c", LAUNCH, str(to_child), str(from_child), binary, *FLAGS]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}"], pass_fds=(to_child, from_child), stderr=subprocess.DEVNULL
        )
        os.close(to_child)
        os.close(from_child)
        self.unread = b""
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command."""
        number = next(self.numbers)
        command = {"id": number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.writer, json.dumps(command).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.unread:
            assert select.select([self.reader], [], [], 30)[0], "the browser does not answer"
            text = os.read(self.reader, 65536)
            assert text, "the browser went away"
            self.unread += text
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        """Loads the page afresh in a window this wide."""
        self.events.clear()
        phone = width < 500
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        drawn = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self("Runtime.evaluate", expression=drawn, awaitPromise=True)

    def complaints(self) -> list[dict[str, Any]]:
        """What the console got since the page was opened."""
        noisy = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event["method"] in noisy]

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def key(self, key: str, code: int) -> None:
        """One key press."""
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def close(self) -> None:
        """Ends the browser, and waits for it."""
        self.session = None
        self("Browser.close")
        self.process.wait(timeout=20)
        os.close(self.writer)
        os.close(self.reader)


def boxes(browser: Browser, selector: str) -> list[list[float]]:
    return browser.ask(BOXES.replace("SELECTOR", json.dumps(selector)))
