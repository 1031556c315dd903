"""The site is built strictly, and what people do with it works in a browser that reaches nothing else."""

from __future__ import annotations

import functools
import http.server
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Browser
from tests.processes import call

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")
ROOT = Path(__file__).parents[2]


def build(target: str) -> None:
    """What `make docs` does; a warning is an error."""
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    logging.basicConfig(level=logging.WARNING)
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=target))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    call(ROOT, build, str(folder))
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    page = Browser(tmp_path)
    yield page
    page.close()


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    """No page asks another host for a script, a style, a font or a picture."""
    asked = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    found = {match for page in pages for match in asked.findall(page.read_text(encoding="utf-8"))}
    assert not found
    styles = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))
    assert not re.findall(r"url\([\"']?https?://|@import", styles)


def test_every_page_of_the_repository_is_there(site: Path) -> None:
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "site"]
    assert all((site / page).with_suffix(".html").is_file() for page in pages)


def test_people_find_their_way(address: str, browser: Browser, tmp_path: Path) -> None:
    """Pages, search, dark mode, a narrow screen; no error, and nothing is asked of another host."""
    browser.screen(1280, 900)
    for page in ("index", "guides/lora", "api/trainer", "errors/data", "performance", "models"):
        browser.open(f"{address}{page}.html")
        assert browser.run("document.querySelector('h1').offsetHeight > 0")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), page
    browser.open(f"{address}index.html?q=EOS%20masked")
    browser.until("document.querySelectorAll('.md-search-result__item').length > 0")
    found = browser.run("[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)")
    assert any(link.startswith(f"{address}errors/data.html") for link in found)
    assert light(browser)
    browser.run("document.getElementById('__palette_1').click()")
    browser.until("document.body.getAttribute('data-md-color-scheme') == 'slate'")
    assert not light(browser)
    browser.screen(390, 844)
    for page in ("index", "choose", "coming_from_lightning", "errors/index"):
        browser.open(f"{address}{page}.html")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), page
    assert not browser.errors
    assert {url for url in browser.requests if not url.startswith((address, "data:"))} == set()


def light(browser: Browser) -> bool:
    """Whether the background is lighter than the text."""
    colour = "getComputedStyle(document.body).{}.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)"
    return browser.run(colour.format("backgroundColor")) > browser.run(colour.format("color"))


def test_the_form_answers_as_the_arithmetic_does(address: str, browser: Browser) -> None:
    from tests.site.test_choose import choose

    browser.open(f"{address}choose.html")
    for question in (
        ("meta-llama/Llama-3.1-8B", "lora", 1, 80, 2048),
        ("meta-llama/Llama-3.1-70B", "full", 32, 80, 8192),
        ("Qwen/Qwen3-0.6B", "pretrain", 8, 24, 2048),
    ):
        for name, value in zip(("model", "goal", "gpus", "memory", "length"), question):
            browser.run(f"document.getElementById('choose-{name}').value = '{value}'")
        browser.run("document.getElementById('choose').dispatchEvent(new Event('change'))")
        assert browser.run("document.getElementById('choose-yaml').textContent") == choose.yaml_of(*question)
    browser.run("document.getElementById('choose-gpus').value = '1'")
    browser.run("document.getElementById('choose-model').value = 'meta-llama/Llama-3.1-70B'")
    browser.run("document.getElementById('choose').dispatchEvent(new Event('change'))")
    assert "does not fit" in browser.run("document.getElementById('choose-answer').textContent")
