"""The pages of real reports in a browser: no errors, no requests, and no overflow on a phone.

Run with `make test-browser`. Skipped where Chromium is not installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from support.commands import needs_torch, run

import bridge
from bridge import Checkpoint

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not installed"),
]

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
    *("--virtual-time-budget=10000", "--enable-logging=stderr"),
)
WIDTHS = (320, 390, 768, 1280)

# A page of the same server with the report in frames of several widths, which measures them.
WRAPPER = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><pre></pre>%s<script>
addEventListener("load", () => {
  document.querySelector("pre").textContent = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, clipped = [];
    for (const e of page.querySelectorAll("figure, svg, h1, h2, .verdict, .scroll, p, li"))
      if (e.getBoundingClientRect().right > frame.clientWidth + 0.5) clipped.push(e.tagName);
    return [frame.clientWidth, page.documentElement.scrollWidth, page.querySelectorAll("svg text").length,
      "[" + clipped + "]", page.querySelector(".verdict").textContent].join("|");
  }).join("\\n");
});
</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of `gpt2 verify` and of `gpt2 diff`, which finds NaN, changed rows and a changed layer."""
    root = tmp_path_factory.mktemp("pages")
    assert run("verify", "bundled", "--batch-size", 1, "--seq-len", 32, "--html", root / "verify.html") == 0
    original = bridge.load("bundled")
    state = {name: np.array(array) for name, array in original.tensors.items()}
    state["wte.weight"][100:140] += 0.01
    state["h.2.mlp.c_fc.weight"] *= 1.001
    state["h.4.ln_1.bias"][0] = np.nan
    other = root / "a model with a long name"
    bridge.save(Checkpoint.of(state, original.config), other, format="huggingface", allow_non_finite=True)
    assert run("diff", "bundled", other, "--seq-len", 32, "--html", root / "diff.html") == 1
    return root


@pytest.fixture
def requests(pages: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server of the pages, and the list of the paths that are requested from it."""
    paths: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            paths.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(pages)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    thread.join()
    server.server_close()


def chromium(profile: Path, *arguments: str) -> tuple[str, list[str]]:
    """Run Chromium. Returns its output and the messages of the page's console."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_torch
@pytest.mark.parametrize(("name", "verdict"), [("verify", "✓ 10 checks hold"), ("diff", "✗ Different: ")])
def test_a_page_loads_without_errors_and_requests(
    name: str, verdict: str, requests: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, paths = requests
    # No other host can be resolved, so a request to one would be an error on the console.
    dom, console = chromium(
        tmp_path, "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--dump-dom", f"{address}/{name}.html"
    )
    assert console == []
    assert paths == [f"/{name}.html"]
    (shown,) = re.findall(r'class="verdict[^>]*>([^<]+)<', dom)
    assert shown.startswith(verdict)


def test_errors_and_requests_are_found(pages: Path, requests: tuple[str, list[str]], tmp_path: Path) -> None:
    (pages / "bad.html").write_text("<!doctype html><script>nonsense()</script><img src=missing.png>")
    _, console = chromium(tmp_path, "--dump-dom", f"{requests[0]}/bad.html")
    assert any("nonsense is not defined" in message for message in console)
    assert "/missing.png" in requests[1]


@needs_torch
@pytest.mark.parametrize("name", ["verify", "diff"])
def test_a_page_fits_every_width(name: str, pages: Path, requests: tuple[str, list[str]], tmp_path: Path) -> None:
    frames = "".join(
        f'<iframe src="{name}.html" style="width:{width}px;height:800px;border:0"></iframe>' for width in WIDTHS
    )
    (pages / f"{name}-widths.html").write_text(WRAPPER % frames)
    dom, console = chromium(tmp_path, "--dump-dom", f"{requests[0]}/{name}-widths.html")
    assert console == []
    (found,) = re.findall(r"<pre>(.*?)</pre>", dom, re.DOTALL)
    rows = [line.split("|") for line in found.splitlines()]
    assert [int(row[0]) for row in rows] == [*WIDTHS]
    for width, scroll_width, texts, clipped, verdict in rows:
        assert int(scroll_width) <= int(width), f"the page is wider than the screen of {width} pixels"
        assert clipped == "[]"
        assert int(texts) > 50, "the plots have no text"
        assert verdict[0] in "✓✗"


@needs_torch
def test_a_page_prints_to_several_sheets(pages: Path, tmp_path: Path) -> None:
    file = tmp_path / "verify.pdf"
    chromium(tmp_path / "profile", "--no-pdf-header-footer", f"--print-to-pdf={file}", (pages / "verify.html").as_uri())
    assert file.read_bytes().startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", file.read_bytes())) <= 20
