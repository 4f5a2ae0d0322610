"""The system's Chromium, hostile texts for it, and what must not be seen in a page."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

HOSTILE = (
    "<script>document.title = 'owned'; fetch('http://127.0.0.1:1/x')</script>"
    "<img src=x onerror=\"document.title='owned'\"> </pre></textarea><!-- verdict --> ```\n# x"
)
CUT_OFF = """() => [...document.querySelectorAll("body *")].filter(e =>
    !e.closest("svg, .skip") && !["TABLE", "THEAD"].includes(e.tagName)
    && !e.closest("thead") && e.clientWidth > 0
    && e.scrollWidth > e.clientWidth + 1
    && getComputedStyle(e).display !== "inline").map(e => e.outerHTML.slice(0, 120))"""
"""Finds what is wider than its place."""
SVG_CUT_OFF = """() => [...document.querySelectorAll("svg text")].filter(e => {
    const [own, all] = [e.getBoundingClientRect(), e.closest("svg").getBoundingClientRect()];
    return own.left < all.left - .5 || own.right > all.right + .5
      || own.top < all.top - .5 || own.bottom > all.bottom + .5;
  }).map(e => e.outerHTML)"""
"""Finds texts of a chart that stand out of it, and so are not seen."""
CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .04045 ? v / 12.92
    : ((v + .055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) {
    const colour = rgb(getComputedStyle(e).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour; } return [255, 255, 255]; };
  let worst = [99, ""];
  const texts = "h1,h2,h3,p,a,li,th,td,pre,ins,del,label,summary,span";
  for (const e of document.querySelectorAll(texts)) {
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < worst[0]) worst = [ratio, e.outerHTML.slice(0, 80)];
  }
  return worst; }"""
"""The lowest contrast of a text with what is behind it, and where."""


class NoBrowser(Exception):
    """There is no Chromium here, or nothing that drives it."""


@contextmanager
def chromium() -> Iterator[Any]:
    """The system's Chromium, driven by Playwright.

    Its loop runs until the end of the ``with``: nothing else in this process may start one.

    Raises:
        NoBrowser: with what is missing.
    """
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise NoBrowser("no Chromium on this machine (make setup-system installs it)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise NoBrowser("Playwright is not installed: install the extra dev") from None
    with sync_playwright() as driver:
        running = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield running
        running.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser for the tests of one file."""
    try:
        with chromium() as running:
            yield running
    except NoBrowser as error:
        pytest.skip(str(error))


@contextmanager
def quiet_pages(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages; whatever one says, or asks for beyond its file, is an error at the end."""
    contexts: list[Any] = []
    noise: list[str] = []

    def opening(url: str, **settings: Any) -> Any:
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:")) else noise.append(request.url)
            ),
        )
        page.goto(url)
        return page

    yield opening
    for context in contexts:
        context.close()
    assert noise == [], noise
