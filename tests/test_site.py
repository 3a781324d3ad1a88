"""The built site: links lead somewhere, formulas are drawn, search finds; in a browser nothing is cut or missing."""

import functools
import http.server
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 390)  # a laptop, a telephone

# Opens every page in a frame of each width, and leaves what is wrong with it as JSON.
HARNESS = """<!doctype html><meta charset="utf-8"><body><script>
const cases = CASES, found = [];
function look(view, name) {
  const page = view.document, root = page.documentElement;
  const add = (kind, what) => found.push(`${name}: ${kind}: ${what}`);
  if (!page.querySelector("article")) add("page", "is not there");
  if (root.scrollWidth > root.clientWidth) add("overflow", `${root.scrollWidth} > ${root.clientWidth}`);
  for (const code of page.querySelectorAll("article pre > code"))
    if (code.scrollWidth > code.clientWidth + 1) add("code is cut", code.textContent.slice(0, 60));
  for (const image of page.querySelectorAll("img"))
    if (!image.complete || !image.naturalWidth) add("image", image.src);
  for (const node of page.querySelectorAll("article code, article pre, article script")) node.remove();
  const tex = page.querySelector("article")?.textContent.match(/\\\\\\\\[([]|\\\\\\\\(frac|sum|sigma|log)|\\\\$\\\\$/);
  if (tex) add("raw TeX", tex[0]);
}
async function run() {
  for (const [path, width] of cases) {
    const frame = document.createElement("iframe");
    frame.style = `width: ${width}px; height: 900px; border: 0`;
    const loaded = new Promise((done) => (frame.onload = done));
    frame.src = path;
    document.body.append(frame);
    await loaded;
    for (const image of frame.contentDocument.querySelectorAll("img"))
      { image.loading = "eager"; await image.decode().catch(() => 0); }
    look(frame.contentWindow, `${path} at ${width}`);
    frame.remove();
  }
  await fetch("/", {method: "POST", body: JSON.stringify({cases: cases.length, found})});
}
run();
</script>"""


class Page(HTMLParser):
    """Collects the names that links may lead to, and the links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.names |= {attributes.get("id"), attributes.get("name")}
        self.links += [attributes[k] for k in ("href", "src") if attributes.get(k) and tag != "base"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built afresh: its folder."""
    pytest.importorskip("material", reason="the site needs mkdocs-material: `make docs` installs it")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """Every page that a reader can open."""
    return {path: Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}


def test_no_link_is_dead(site, pages):
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            there = target.exists() and target.is_relative_to(site)
            if there and parts.fragment and target in pages:
                there = unquote(parts.fragment) in pages[target].names
            if not there:
                dead.append(f"{path.relative_to(site)}: {link}")
    assert dead == []


def test_nothing_is_loaded_from_elsewhere(pages):
    loaded = r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)"'
    assert [u for path in pages for u in re.findall(loaded, path.read_text())] == []


def test_formulas_are_drawn_without_a_script(site):
    assert (site / "ms_deform_attn.html").read_text().count("<math") == 3
    assert not [path for path in site.rglob("*.html") if 'class="arithmatex"' in path.read_text()]


def test_lists_are_lists(pages):
    """Markdown needs a blank line before a list; without one its lines run into the paragraph."""
    run_together = [
        f"{path.name}: {line}"
        for path in pages
        for block in re.findall(r"<p>(.*?)</p>", path.read_text(), re.DOTALL)
        for line in block.split("\n")[1:]
        if re.match(r"(- |\* |\d+\. )", line)
    ]
    assert run_together == []


@pytest.mark.parametrize("words", ["grounding dino", "eomt", "cuda graph", "accelerate", "deformable attention"])
def test_search_finds(site, words):
    documents = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    texts = [re.sub(r"[\s_-]+", " ", f"{d['title']} {d['text']}".lower()) for d in documents]
    assert any(words in text for text in texts)


def test_first_page_shows_what_it_is_about(site):
    """`accelerate`, a number and a picture within the first lines."""
    text = (ROOT / "docs" / "index.md").read_text()
    first = text[: text.index("\n## ")]
    assert "m2f_kernels.accelerate(" in first
    assert "![" in first
    assert re.search(r"\d\.\d s .* instead of \d\.\d", first)


def test_pages_in_a_browser(site, pages, tmp_path):
    if BROWSER is None:
        pytest.skip("no Chromium is installed, which opens the pages")
    cases = [[f"/{path.relative_to(site)}", width] for path in sorted(pages) for width in WIDTHS]
    (site / "harness.html").write_text(HARNESS.replace("\\\\", "\\").replace("CASES", json.dumps(cases)))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Served, directory=site)) as server:
        server.results = queue.Queue()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
        command += [f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--window-size=1400,1000"]
        # Without the network at once, instead of after its time limit.
        command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-port=0"]
        with open(tmp_path / "log", "w") as log:
            address = f"http://127.0.0.1:{server.server_port}/harness.html"
            browser = subprocess.Popen([*command, address], stderr=log, stdout=log, start_new_session=True)
            try:
                result = json.loads(server.results.get(timeout=240))
            finally:
                os.killpg(browser.pid, signal.SIGKILL)
                browser.wait()
                server.shutdown()
    assert result["cases"] == len(cases) > 20
    assert result["found"] == []
    # The theme asks GitHub for the repository's stars, which needs the network.
    errors = [
        line
        for line in (tmp_path / "log").read_text().splitlines()
        if "CONSOLE" in line and "api.github.com" not in line
    ]
    assert [line for line in errors if re.search(r"error|failed|Uncaught", line, re.IGNORECASE)] == []


class _Served(http.server.SimpleHTTPRequestHandler):
    """Serves the site, and takes what the harness has found."""

    def do_POST(self):
        self.server.results.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass
