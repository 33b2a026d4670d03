"""The report page in a real browser: no console error, every picture loads, readable on a phone and on a wide screen."""
import re

import pytest
from devtools import BROWSER, DevTools

pytestmark = [pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine"), pytest.mark.xdist_group("smoke")]


@pytest.fixture
def browser(tmp_path):
    tools = DevTools(tmp_path)
    yield tools
    tools.close()


@pytest.mark.parametrize("width", [400, 1600])
def test_report_in_a_browser(browser, smoke_report, width):
    browser.open(smoke_report / "index.html", width)
    assert browser.complaints() == []
    assert browser.evaluate("[...document.images].length") > 3
    assert browser.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt)") == []
    assert browser.evaluate("[...document.images].filter(i => !i.alt).length") == 0
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "the page scrolls sideways"
    assert browser.evaluate("Math.min(...[...document.querySelectorAll('p,td,th,li,a')].filter(e => e.textContent.trim()).map(e => parseFloat(getComputedStyle(e).fontSize)))") >= 12
    assert browser.evaluate("[...document.querySelectorAll('main a[href^=\"#\"]')].filter(a => !document.getElementById(a.getAttribute('href').slice(1))).length") == 0


def test_executed_notebooks_open_without_network(browser, smoke_report):
    pages = sorted((smoke_report / "notebooks").glob("*.html"))
    assert pages
    for page in pages[:3]:
        browser.open(page, 1200)
        assert browser.complaints() == []


def test_links_of_the_page_lead_somewhere(smoke_report):
    page = (smoke_report / "index.html").read_text()
    for link in re.findall(r'href="([^"#:]+)"', page):
        assert (smoke_report / link).exists(), link
