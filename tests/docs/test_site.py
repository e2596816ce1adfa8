"""The built site draws its formulae and diagrams by itself: a reader's browser asks no other host."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JAVASCRIPTS = ROOT / "docs/javascripts"
#: What a browser fetches by itself, by element; a link in the text is fetched when somebody clicks on it.
FETCHED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "embed": "src"}
ELSEWHERE = re.compile(r"(?:https?:)?//")


class Page(HTMLParser):
    """Collects what the page fetches, and the formulae and classes in it."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.classes, self.formulae = [], set(), []
        self.element = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.fetched += [given.get(FETCHED.get(tag), "")]
        classes = (given.get("class") or "").split()
        self.classes |= set(classes)
        self.element = tag
        if "arithmatex" in classes:
            self.formulae.append("")
            self.element = "formula"

    def handle_endtag(self, tag):
        self.element = ""

    def handle_data(self, data):
        if self.element == "formula":
            self.formulae[-1] += data
        elif self.element == "style":
            self.fetched += fetched_by_style(data)


def fetched_by_style(text):
    return re.findall(r"""(?:url\(|@import\s)\s*["']?([^"')\s]+)""", text)


def fetched_elsewhere(addresses):
    return [address for address in addresses if ELSEWHERE.match(address or "")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {p.relative_to(site).as_posix(): Page(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}


def test_pages_fetch_nothing_from_another_host(pages):
    assert len(pages) > 20
    assert {name: found for name, page in pages.items() if (found := fetched_elsewhere(page.fetched))} == {}


def test_styles_fetch_nothing_from_another_host(site):
    styles = {p: fetched_by_style(p.read_text(encoding="utf-8")) for p in site.rglob("*.css")}
    assert any("KaTeX" in address for found in styles.values() for address in found)
    assert {p.name: found for p, addresses in styles.items() if (found := fetched_elsewhere(addresses))} == {}


def test_what_would_be_fetched_is_seen():
    page = Page(
        '<script src="https://a/b.js"></script><link href="//c/d.css"><img src="e.png">'
        '<style>@import "http://f/g.css"; p { background: url(h.png) }</style><a href="https://i/"></a>'
    )
    assert fetched_elsewhere(page.fetched) == ["https://a/b.js", "//c/d.css", "http://f/g.css"]


def test_the_theme_fetches_no_mermaid(pages):
    """Material asks unpkg.com for Mermaid on every page that has something of that class."""
    assert not [name for name, page in pages.items() if "mermaid" in page.classes]
    assert "diagram" in pages["architecture/index.html"].classes
    texts = re.findall('"([^"]*)"', (JAVASCRIPTS / "site.js").read_text())
    assert "katex/katex.min.js" in texts and not fetched_elsewhere(texts)


def test_what_the_site_loads_is_here_with_its_licence():
    for path in re.findall(r'"(\w+/[\w.]+\.(?:js|css))"', (JAVASCRIPTS / "site.js").read_text()):
        assert (JAVASCRIPTS / path).is_file(), path
        assert "MIT License" in (JAVASCRIPTS / path).with_name("LICENSE").read_text()
    style = (JAVASCRIPTS / "katex/katex.min.css").read_text()
    fonts = [address for address in fetched_by_style(style) if address.endswith(".woff2")]
    assert len(fonts) > 10
    assert not [address for address in fonts if not (JAVASCRIPTS / "katex" / address).is_file()]


@pytest.mark.skipif(not shutil.which("node"), reason="draws the formulae as a browser does, with node")
def test_every_formula_can_be_drawn(pages):
    formulae = [text.strip()[2:-2] for page in pages.values() for text in page.formulae]
    assert len(formulae) > 30
    script = (
        f"const katex = require({json.dumps(str(JAVASCRIPTS / 'katex/katex.min.js'))});"
        "for (const text of JSON.parse(require('fs').readFileSync(0, 'utf8')))"
        " katex.renderToString(text, { strict: 'error' });"
    )

    def draw(texts):
        return subprocess.run(["node", "-e", script], input=json.dumps(texts), capture_output=True, text=True)

    assert draw(formulae).returncode == 0, draw(formulae).stderr
    assert "ParseError" in draw([r"\frac{1"]).stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="draws a page in chromium")
@pytest.mark.parametrize(("name", "formulas"), [("architecture", False), ("idea", True)])
def test_a_browser_draws_diagrams_and_formulas(site, tmp_path, name, formulas):
    result = subprocess.run(
        [
            *["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"],
            *["--virtual-time-budget=20000", "--dump-dom", (site / name / "index.html").as_uri()],
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    page = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
    assert len(re.findall(r'<pre class="diagram"[^>]*><svg', result.stdout)) == page.count("```mermaid") > 0
    assert "Syntax error" not in result.stdout
    assert ('class="katex"' in result.stdout) == formulas
