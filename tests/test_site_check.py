"""The check of the built site, on small sites that each have one fault: it has to find it."""

import base64

import pytest

from tests.site import browser, check_site, files

PIXEL = "data:image/png;base64," + base64.b64encode(
    # One black pixel.
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154"
        "789c63606060000000040001f61738550000000049454e44ae426082"
    )
).decode("ascii")
HEAD = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Page</title></head>'
    "<body><main><h1>Page</h1>"
)
TAIL = "</main></body></html>"
TABLE = (
    "<table><tr><th>Document</th><th>Modified</th><th>Method</th><th>Run Time (s)</th><th>Status</th></tr>"
    "{}</table>"
)
ROW = "<tr><td><p>{}</p></td><td>today</td><td>cache</td><td><p>{}</p></td><td>ok</td></tr>"


@pytest.fixture
def site(tmp_path):
    def write(**pages):
        for name, body in pages.items():
            (tmp_path / f"{name}.html").write_text(HEAD + body + TAIL, encoding="utf-8")
        return tmp_path.resolve()

    return write


class TestFiles:
    def test_links_that_lead_somewhere(self, site):
        root = site(
            a='<a href="b.html#there">b</a> <a href="#here">a</a> <a href="b.html?q=1">b</a>'
            '<i id="here"></i> <a href="https://example.org/x#y">outside</a>',
            b=f'<a name="there"></a><img src="{PIXEL}" alt="one black pixel">',
        )
        assert files.check_links(root) == []

    @pytest.mark.parametrize(
        ("body", "fault"),
        [
            ('<a href="c.html">c</a>', "a.html: c.html leads to no file"),
            ('<a href="b.html#gone">b</a>', "a.html: b.html#gone leads to no anchor"),
            ('<a href="#gone">a</a>', "a.html: #gone leads to no anchor"),
            ('<script src="gone.js"></script>', "a.html: gone.js leads to no file"),
            (f'<img src="{PIXEL}">', f"a.html: image without a description: {PIXEL[:80]}"),
            (f'<img src="{PIXEL}" alt=" ">', f"a.html: image without a description: {PIXEL[:80]}"),
            (f'<img src="{PIXEL}" alt="../x.png">', f"a.html: image without a description: {PIXEL[:80]}"),
        ],
    )
    def test_faults(self, site, body, fault):
        assert files.check_links(site(a=body, b="")) == [fault]

    def test_pages_of_static_material_are_no_pages(self, site):
        root = site(a="")
        (root / "_static").mkdir()
        (root / "_static" / "b.html").write_text('<a href="gone.html">', encoding="utf-8")
        assert [path.name for path in files.pages(root)] == ["a.html"]
        assert files.check_links(root) == []


def test_downloads(site):
    root = site(one='<a href="../_sources/one.ipynb">notebook</a>', two="no link")
    assert files.check_downloads(root, ["one", "two", "three"]) == [
        "two.html: no link to download the notebook",
        "three.html: the chapter has no page",
    ]


class TestRunTimes:
    def table(self, site, *rows):
        return site(times=TABLE.format("".join(ROW.format(*row) for row in rows))) / "times.html"

    def test_within_the_budget(self, site):
        page = self.table(site, ("book/index", "4.5"), ("chapters/1", "179.9"))
        assert files.check_run_times(page, {"chapters/1": 60}) == (
            [],
            {"book/index": 4.5, "chapters/1": 179.9},
        )

    def test_a_slow_page(self, site):
        faults, _ = files.check_run_times(self.table(site, ("book/a", "270.6")), {})
        assert faults == ["times.html: book/a took 271 s, more than 3 times 90 s"]

    def test_a_chapter_that_takes_longer_than_it_states(self, site):
        faults, _ = files.check_run_times(self.table(site, ("chapters/1", "60.6")), {"chapters/1": 20})
        assert faults == ["times.html: chapters/1 took 61 s, more than 3 times 20 s"]

    def test_a_slow_book(self, site):
        rows = [(f"chapters/{n}", "250") for n in range(11)]
        faults, _ = files.check_run_times(self.table(site, *rows), {})
        assert faults == ["times.html: the book took 2750 s, more than 3 times 900 s"]

    def test_a_missing_chapter(self, site):
        faults, _ = files.check_run_times(self.table(site, ("chapters/1", "1")), {"chapters/2": 1})
        assert faults == ["times.html: chapters/2 is not in the table"]

    def test_a_chapter_that_states_no_run_time(self, tmp_path):
        (tmp_path / "1.ipynb").write_text("**Run time**: about 20 s on a 2-core CPU.")
        assert files.stated_seconds(tmp_path / "1.ipynb") == 20
        (tmp_path / "1.ipynb").write_text("**Run time**: short.")
        with pytest.raises(ValueError, match=r"1\.ipynb states no run time"):
            files.stated_seconds(tmp_path / "1.ipynb")

    def test_no_table(self, site, tmp_path):
        assert "no table of run times" in files.check_run_times(site(times="") / "times.html", {})[0][0]
        assert "there is no page" in files.check_run_times(tmp_path / "gone.html", {})[0][0]


def test_the_longest_listing_stands_for_all(tmp_path):
    for name, size in (
        ("a.html", 9),
        ("_modules/b.html", 1),
        ("_modules/c/d.html", 3),
        ("_modules/e.html", 2),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x" * size)
    spared = check_site.other_listings(files.pages(tmp_path), tmp_path)
    assert {path.name for path in spared} == {"b.html", "e.html"}


def test_without_a_browser_it_says_so_and_fails(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(check_site, "find_chromium", lambda: None)
    monkeypatch.setattr("sys.argv", ["check_site", str(tmp_path)])
    assert check_site.main() == 2
    assert "Chromium was not found" in capsys.readouterr().err


SLIDER = """
<script type="application/vnd.jupyter.widget-view+json">{{}}</script>
<div class="widget-vbox">
  <div class="widget-slider"><span role="slider" tabindex="0" {name} aria-valuemin="0" aria-valuemax="1"
    aria-valuenow="0">o</span></div>
  <img src="{pixel}" alt="the first of two pictures">
</div>
<script>
  document.querySelector("[role=slider]").addEventListener("keydown", (event) => {{ {action} }});
</script>
"""
TURN = "document.querySelector('.widget-vbox img').alt = 'the second of two pictures';"


@pytest.mark.slow
@pytest.mark.skipif(check_site.find_chromium() is None, reason="needs Chromium (apt-get install chromium)")
class TestBrowser:
    @pytest.fixture(scope="class")
    @classmethod
    def window(cls):
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            window = browser.open_window(playwright, check_site.find_chromium())
            yield window
            window.browser.close()

    def faults(self, window, root):
        return browser.check_page(window, root / "a.html", root).faults

    def test_a_page_without_faults(self, window, site):
        root = site(
            a=f'<p>Text.</p><img src="{PIXEL}" alt="one black pixel" style="width: 90%; height: 40px">'
            + SLIDER.format(name='aria-label="step"', pixel=PIXEL, action=TURN)
        )
        visit = browser.check_page(window, root / "a.html", root)
        assert (visit.faults, visit.sliders) == ([], 1)

    @pytest.mark.parametrize(
        ("now", "action"),
        [
            ("0", f"setTimeout(() => {{ {TURN} }}, 400)"),  # a busy machine is slow, not wrong
            ("1", f"if (event.key === 'ArrowLeft') {{ {TURN} }}"),  # at its end a slider can only go back
        ],
    )
    def test_a_slider_that_changes_its_picture(self, window, site, now, action):
        slider = SLIDER.format(name='aria-label="step"', pixel=PIXEL, action=action)
        assert self.faults(window, site(a=slider.replace('valuenow="0"', f'valuenow="{now}"'))) == []

    @pytest.mark.parametrize(
        ("body", "fault"),
        [
            ("<script>throw new Error('broken')</script>", "script error: broken"),
            ("<script>console.error('complaint')</script>", "console: complaint"),
            (f'<img src="http://127.0.0.1:9/x.png" alt="{"a" * 9}">', "outside the book"),
            ("<mjx-merror>\\wrong</mjx-merror>", "formula that cannot be set: \\wrong"),
            ('<span class="math">\\(x^2\\)</span>', "formula that cannot be set: \\(x^2\\)"),
            ('<div style="width: 700px">wide</div>', "px wide on a phone of 360 px"),
            ('<p style="color: #999; background: #aaa">grey on grey</p>', "color contrast"),
            (f'<img src="{PIXEL}">', "axe, phone light, phone dark, desk light, desk dark: critical"),
            (
                "<style>@media (min-width: 600px) { p { color: #aaa } }</style><p>pale</p>",
                "axe, desk light, desk dark: serious",
            ),
            (
                "<style>@media (max-width: 600px) and (prefers-color-scheme: dark) { p { color: #aaa } }"
                "</style><p>pale</p>",
                "axe, phone dark: serious: Elements must meet minimum color contrast",
            ),
            (
                f'<img src="{PIXEL}" alt="tall pixel" style="width: 9px; height: 2000px">',
                "larger than a sheet",
            ),
            (
                f'<img src="{PIXEL}" alt="tall pixel" style="width: 9px; height: 2000px">',
                "prints 1 figures in 2 pieces",
            ),
            (SLIDER.format(name="", pixel=PIXEL, action=TURN), "slider 1 has no name"),
            (SLIDER.format(name='aria-label="step"', pixel=PIXEL, action=""), "does not change its picture"),
        ],
    )
    def test_faults(self, window, site, monkeypatch, body, fault):
        if "does not change" in fault:  # what never comes is not worth a wait
            monkeypatch.setattr(browser.Visit, "_comes", lambda _, condition: condition())
        found = self.faults(window, site(a=body))
        assert any(fault in line for line in found), found

    def test_search(self, window, site):
        root = site(
            search='<ul id="search-results"></ul><script>if (location.search === "?q=gradient") '
            "document.querySelector('ul').innerHTML = '<li><a href=x>Chapter</a></li>';</script>"
        )
        assert browser.check_search(window, root, "gradient", "Chapter") == []

    def test_search_that_finds_nothing(self, window, site, monkeypatch):
        monkeypatch.setattr(browser, "PATIENCE", 500)
        root = site(search='<ul id="search-results"></ul>')
        assert "does not find 'Chapter'" in browser.check_search(window, root, "gradient", "Chapter")[0]
        assert "no search page" in browser.check_search(window, root / "gone", "gradient", "Chapter")[0]

    @pytest.mark.parametrize(("state", "faults"), [("open", 0), ("", 1)])
    def test_gallery(self, window, site, monkeypatch, state, faults):
        if faults:
            monkeypatch.setattr(browser, "PATIENCE", 500)  # what never comes is not worth a wait
        root = site(
            a=f'<div class="gallery-card"><a href="b.html#fig"><img src="{PIXEL}" alt="one pixel"></a></div>',
            b=f'<div class="cell"><details {state}><summary>Code</summary><p class="cell_input">draw()</p>'
            f'</details><figure id="fig"><img src="{PIXEL}" alt="one pixel"></figure></div>',
        )
        assert len(browser.check_gallery(window, root / "a.html", root)) == faults
        assert browser.check_gallery(window, root / "gone.html", root) == ["there is no gallery"]
