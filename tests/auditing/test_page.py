"""The report as one page: nothing in it runs, nothing is fetched, and no picture is in it unasked."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from invlib.auditing.words import KINDS, NOT_FOUND, VERDICTS
from tests.site import browser, check_site, reports

HOSTILE = '</td></table><script>alert(1)</script><img src=x onerror="alert(2)">&amp;\x00\u202egnp'


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # every element is closed, in its order

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.said.append((self.open[-1], data))

    def texts(self, tag: str) -> list[str]:
        return [text for where, text in self.said if where == tag]

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_every_verdict_and_kind_appears_with_each_finding() -> None:
    page = Elements(reports.report().to_html())
    assert {*VERDICTS} <= {*page.texts("strong")}
    assert {*KINDS} <= {*page.texts("span")}
    articles = reports.report().to_html().split("<article>")[1:]
    findings = [
        found
        for part in ("leaks", "attacks", "reasons", "defences")
        for found in getattr(reports.report(), part)
    ]
    for text, found in zip(articles, findings, strict=True):
        article = Elements(text.partition("</article>")[0])
        assert article.texts("strong")[0] == found.verdict
        assert [word for word in article.texts("span") if word in KINDS] == [found.kind]


@pytest.mark.parametrize("verdict", VERDICTS)
def test_a_whole_verdict_is_said_in_words(verdict: str) -> None:
    page = Elements(reports.short(verdict).to_html())
    assert page.texts("strong")[0] == verdict
    assert verdict in page.texts("dt")
    assert not re.search(r"\bsafe\b", " ".join(text for where, text in page.said if where != "style"))


def test_the_order_of_the_page() -> None:
    page = Elements(reports.report().to_html())
    said = [text for _, text in page.said]
    summary = [said.index(sentence) for sentence in reports.report().summary]
    assert summary == sorted(summary)
    assert summary[-1] < said.index("Scope")
    titles = page.texts("h2")
    assert titles == [
        "Scope",
        "What needs no search",
        "Attacks",
        "Why an attack failed",
        "Defences",
        "What was not tried",
        "For the auditor",
    ]
    assert page.of("html") == [{"lang": "en"}]
    assert not page.open


def test_links_lead_to_its_parts() -> None:
    page = Elements(reports.report().to_html(pictures=True))
    ids = [a["id"] for a in page.of("section")]
    assert [a["href"] for a in page.of("a")] == [f"#{name}" for name in ids]


def test_what_comes_from_outside_is_escaped() -> None:
    hostile = reports.finding(
        "partly",
        "found by an attack",
        name=HOSTILE,
        text=HOSTILE,
        numbers={HOSTILE: HOSTILE, "list": [HOSTILE]},
        advice=HOSTILE,
    )
    made = reports.report(
        summary=(HOSTILE,) * 3,
        scope={HOSTILE: HOSTILE},
        leaks=(hostile,),
        not_tried=(HOSTILE,),
        pictures={HOSTILE: torch.zeros(1, 3, 4, 4)},
    )
    text = made.to_html(pictures=True)
    page, plain = Elements(text), Elements(reports.report().to_html())
    assert not page.of("script")
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements} | {
        "img",
        "figure",
        "figcaption",
        "div",
    }
    assert all(image["src"].startswith("data:image/png") for image in page.of("img"))
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert HOSTILE.replace("\x00", "�").replace("\u202e", "�") in page.texts("h3")
    text.encode()


def test_text_that_no_file_can_hold_is_replaced() -> None:
    reports.report(scope={"file": "\udcff.safetensors"}).to_html().encode()


def test_nothing_is_fetched_or_run() -> None:
    text = reports.report().to_html(pictures=True)
    page = Elements(text)
    assert not page.of("script") + page.of("link") + page.of("iframe")
    assert "url(" not in text
    assert "http:" not in text.replace("http-equiv", "")
    assert "https:" not in text
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "script" not in policy


def test_no_pixel_is_there_unasked() -> None:
    made = reports.report()
    assert made.to_html() == reports.report(pictures={}).to_html(pictures=True)
    assert not Elements(made.to_html()).of("img")
    assert "data:image" not in made.to_html()


def test_pictures_that_were_asked_for() -> None:
    images = torch.tensor([0, 51, 255, 102], dtype=torch.float32).reshape(1, 1, 2, 2) / 255
    page = Elements(reports.report(pictures={"recovered": images}).to_html(pictures=True))
    (tag,) = page.of("img")
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(tag["src"].partition(",")[2]))))
    assert pixels.tolist() == [[0, 51], [255, 102]]  # as they are; the browser makes them large
    assert (tag["alt"], tag["width"], tag["class"]) == ("recovered: image 1 of 1", "128", "small")


@pytest.mark.parametrize(("shape", "count"), [((40, 3, 8, 8), 32), ((2, 2, 8, 8), 0), ((1, 3, 300, 20), 1)])
def test_pictures_of_other_shapes(shape: tuple[int, ...], count: int) -> None:
    text = reports.report(pictures={"recovered": torch.zeros(shape)}).to_html(pictures=True)
    assert len(Elements(text).of("img")) == count


def test_a_partial_report_says_so_first() -> None:
    page = Elements(reports.report(complete=False, defences=()).to_html())
    said = [text for _, text in page.said]
    assert said.index("This report is partial.") < said.index("recovered and certified")
    assert "This part was not run." in said
    assert "partial" not in Elements(reports.report().to_html()).texts("strong")
    whole = [text for _, text in Elements(reports.report(reasons=()).to_html()).said]
    assert "Nothing failed." in whole
    assert "This part was not run." not in whole


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "not known"),
        (True, "yes"),
        (7, "7"),
        (1_234_567, "1,234,567"),
        (0.0, "0"),
        (0.123456, "0.1235"),
        (12_345.6, "12,346"),
        (3.2e-9, "3.2×10⁻⁹"),
        (-2.5e12, "-2.5×10¹²"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ([], "none"),
        ([1, 2.5, "x"], "1, 2.5, x"),
        (list(range(20)), "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 … (20 in all)"),
    ],
)
def test_numbers_as_people_read_them(value: object, shown: str) -> None:
    page = Elements(reports.report(scope={"some_number": value}).to_html())
    assert page.texts("th")[0] == "some number"
    assert page.texts("td")[0] == shown


@pytest.mark.slow
@pytest.mark.skipif(check_site.find_chromium() is None, reason="needs Chromium (apt-get install chromium)")
def test_in_a_browser(tmp_path) -> None:
    from playwright.sync_api import sync_playwright

    path = reports.write(tmp_path.resolve())[0]
    with sync_playwright() as playwright:
        window = browser.open_window(playwright, check_site.find_chromium())
        assert browser.check_page(window, path, path.parent).faults == []
        page = window.new_page()
        page.goto(path.as_uri())
        table = page.locator("details table").first
        assert not table.is_visible()
        page.emulate_media(media="print", color_scheme="dark")
        assert table.is_visible()  # what is folded on the screen is on paper
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        window.browser.close()


def test_not_found_is_never_without_its_proviso() -> None:
    assert "no proof of safety" in NOT_FOUND
    assert Elements(reports.short(NOT_FOUND).to_html()).texts("strong").count(NOT_FOUND) == 2
