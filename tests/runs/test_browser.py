"""The page in a real browser: no error is logged, it fits on small and large screens, and its tables are sorted."""

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from moe_unlearn.runs import report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(BROWSER is None, reason="there is no browser: install Debian's package chromium"),
]
WORD = "unbroken" * 40


class Tab:
    """A tab of a browser without a window, spoken to by its own protocol."""

    def __init__(self, folder):
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.events, self.count = [], 0
        port = _waited(lambda: (Path(folder) / "DevToolsActivePort").read_text(encoding="utf-8").splitlines()[0])
        tabs = _waited(lambda: json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10)))
        path = next(tab for tab in tabs if tab["type"] == "page")["webSocketDebuggerUrl"].partition(f":{port}")[2]
        self.socket = socket.create_connection(("127.0.0.1", int(port)), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        asked = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        self.socket.sendall(f"{asked}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        self.file = self.socket.makefile("rb")
        while self.file.readline().strip():  # the head of the answer
            pass

    def ask(self, method, **given):
        """Call a method and return its result; events that come before it are kept."""
        self.count += 1
        text = json.dumps({"id": self.count, "method": method, "params": given}).encode()
        length = struct.pack("!BH", 0xFE, len(text)) if len(text) > 125 else bytes([0x80 | len(text)])
        self.socket.sendall(b"\x81" + length + bytes(4) + text)  # masked with zeros
        while (message := self._read()).get("id") != self.count:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def value(self, script):
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def _read(self):
        parts, last = [], False
        while not last:
            first, second = self.file.read(2)
            last, size = bool(first & 0x80), second & 0x7F
            if size > 125:
                size = struct.unpack("!H" if size == 126 else "!Q", self.file.read(2 if size == 126 else 8))[0]
            parts.append(self.file.read(size))
        return json.loads(b"".join(parts))


def _waited(get):
    for _ in range(600):
        try:
            return get()
        except (OSError, IndexError, StopIteration):
            time.sleep(0.1)
    return get()


@pytest.fixture(scope="module")
def tab():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = Tab(folder)
        for domain in ("Page", "Runtime", "Log"):
            made.ask(f"{domain}.enable")
        yield made
        made.process.kill()
        made.process.wait()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with everything that a report can have, long words and hostile texts among it."""
    out = tmp_path_factory.mktemp("out")
    hostile = f"<script>document.title = 'lost'</script> {WORD}"
    names = ("target", "retrain", "npo", "trace", "wagle", "mollm")
    summary = {name: {"verbmem_f": 1 - 0.1 * i, "verbmem_r": 0.5, "nll_f": 1.0 + i} for i, name in enumerate(names)}
    steps = [{"step": i, "forget_loss": i / 3, "retain_loss": 1.0, "lambda_forget": 0.5} for i in range(9)]
    table = [[(7 * layer + 3 * expert) % 11 / 11 for expert in range(64)] for layer in range(16)]
    sample = dict.fromkeys(("prompt", "truth", "before", "after"), hostile)
    about = {"command": f"run {WORD}", "started": "now", "seed": 0, "machine": "m", "versions": {"torch": "2"}}
    content = report.Content(
        summary,
        hostile,
        trajectories={"npo": steps},
        routes={"forget": table, "retain": table, "after": table[::-1]},
        loaded={"model": hostile, "dtype": "d", "device": "cpu", "trust_remote_code": True},
        about=about,
        samples={"forget": [sample], "retain": [sample]},
        recipe=f"name: {WORD}",
    )
    report.write(out, content)
    return out / "report.html"


def opened(tab, page, width, height=900, media=""):
    tab.events.clear()
    tab.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
    tab.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": media or "light"}])
    tab.ask("Page.navigate", url=page.as_uri())
    for _ in range(600):
        if tab.value("location.protocol + document.readyState") == "file:complete":
            return
        time.sleep(0.1)
    pytest.fail("the page was not loaded within a minute")


@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_fits_and_logs_no_error(tab, page, width, tmp_path):
    opened(tab, page, width)
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert (
        tab.value("Math.max(...[...document.querySelectorAll('svg')].map(own => own.getBoundingClientRect().right))")
        <= width
    )
    assert tab.value("document.title").startswith("Unlearning report: <script>")
    logged = [
        e
        for e in tab.events
        if e["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    ]
    assert not logged
    shot = base64.b64decode(tab.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"])
    (tmp_path / f"{width}.png").write_bytes(shot)
    assert shot.startswith(b"\x89PNG") and len(shot) > 20_000


def test_dark_screens_get_a_dark_page_and_paper_a_white_one(tab, page):
    colour = "getComputedStyle(document.body).backgroundColor"
    opened(tab, page, 1400, media="dark")
    assert tab.value(colour) == "rgb(21, 23, 26)"
    tab.ask("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert tab.value(colour) == "rgb(255, 255, 255)"
    tab.ask("Emulation.setEmulatedMedia", media="")


def test_a_click_on_a_heading_sorts_by_numbers(tab, page):
    opened(tab, page, 1400)
    column = "[...document.querySelectorAll('table')[0].tBodies[0].rows].map(row => row.cells[1].textContent)"
    click = "document.querySelectorAll('table')[0].tHead.rows[0].cells[1].click()"
    assert tab.value(column)[0] == "1.000"
    tab.value(click)
    assert tab.value(column) == sorted(tab.value(column)) and tab.value(column)[0] == "0.500"
    tab.value(click)
    assert tab.value(column)[0] == "1.000"
