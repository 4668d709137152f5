"""What only a browser can tell: scripts that fail, sliders that do not move, text that cannot be read."""

import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import BrowserContext, Locator, Playwright, TimeoutError

WIDGET = 'script[type="application/vnd.jupyter.widget-view+json"]'
# What differs from Playwright's own choice: nothing in the background may ask for the network.
FLAGS = ["--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
PATIENCE = 300_000  # milliseconds; a busy machine is slow, not wrong
# A page's scripts are told of a new width before the next frame.
TWO_FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
WIDTHS = {"phone": 360, "desk": 1280}
THEMES = ("light", "dark")
GRAVE = ("serious", "critical")
AXE = Path(__file__).parent / "vendor" / "axe" / "axe.min.js"

# A4 with margins of a centimetre, in CSS pixels.
PAPER = {"width": 718, "height": 1047}


class Visit:
    """One page, opened from disk without a network, and the faults found on it so far."""

    def __init__(self, context: BrowserContext, path: Path, root: Path) -> None:
        self.faults: list[str] = []
        self.sliders = 0
        self.page = context.new_page()
        self.page.on("pageerror", lambda error: self.faults.append(f"script error: {error}"))
        self.page.on("console", self._console)
        self.page.on("requestfailed", lambda request: self.faults.append(f"cannot load {request.url}"))
        self.page.on("request", lambda request: self._requested(request.url, root.as_uri()))
        self.page.goto(path.as_uri(), wait_until="load")
        if 'http-equiv="Refresh"' in path.read_text(encoding="utf-8"):
            self.page.wait_for_url(lambda url: url != path.as_uri(), wait_until="load")
        self.page.evaluate("window.MathJax?.startup?.promise")  # formulas are set after the page has loaded

    def _console(self, line) -> None:
        if line.type == "error":
            self.faults.append(f"console: {line.text}")

    def _requested(self, url: str, root: str) -> None:
        if not url.startswith((root, "data:", "blob:", "about:")):
            self.faults.append(f"asks for {url}, outside the book")

    def check_formulas(self) -> None:
        """See that every formula was set: with an error it is set in red, without MathJax not at all."""
        for faulty in ("mjx-merror", ".math:not(:has(mjx-container))"):
            for formula in self.page.locator(faulty).evaluate_all("all => all.map(f => f.textContent)"):
                self.faults.append(f"formula that cannot be set: {formula}")

    def check_sliders(self) -> None:
        """Wait for the page's widgets and see that each slider has a name and changes its picture."""
        expected = self.page.locator(WIDGET).count()
        if not expected:
            return
        try:
            self.page.wait_for_function(
                "n => document.querySelectorAll('.widget-slider').length >= n",
                arg=expected,
                timeout=PATIENCE,
            )
        except TimeoutError:
            appeared = self.page.locator(".widget-slider").count()
            self.faults.append(f"{expected} widgets are on the page, {appeared} sliders appeared")
            return
        boxes = self.page.locator(".widget-vbox:has(> .widget-slider)")
        self.sliders = boxes.count()
        for index in range(self.sliders):
            self._move(boxes.nth(index), f"slider {index + 1}")

    def _move(self, box: Locator, name: str) -> None:
        handle = box.get_by_role("slider")
        try:
            box.locator("img:visible").first.wait_for(timeout=PATIENCE)
        except TimeoutError:
            self.faults.append(f"{name} shows no picture")
            return
        if not handle.get_attribute("aria-label"):
            self.faults.append(f"{name} has no name")
        before = picture(box)
        at_its_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        handle.press("ArrowLeft" if at_its_end else "ArrowRight")
        if not self._comes(lambda: picture(box) != before):
            self.faults.append(f"{name} does not change its picture")
        for alt in [alt for alt, _ in picture(box) if len(alt.strip()) < 8]:
            self.faults.append(f"{name} shows an image without a description: {alt!r}")

    def _comes(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition and return whether it came true."""
        end = time.monotonic() + PATIENCE / 1000
        while not condition():
            if time.monotonic() > end:
                return False
            self.page.wait_for_timeout(20)
        return True

    def check_accessibility(self) -> None:
        """Run axe at both widths and in both themes and keep what it calls serious or critical."""
        self.page.evaluate(AXE.read_text(encoding="utf-8"))
        # A colour that is still on its way from one theme to the other belongs to neither.
        self.page.add_style_tag(content="*, *::before, *::after { transition: none !important; }")
        found: dict[str, list[str]] = {}
        for device, width in WIDTHS.items():
            self.page.set_viewport_size({"width": width, "height": 800})
            for theme in THEMES:
                self.page.emulate_media(color_scheme=theme)
                if self.page.locator("html[data-theme]").count():
                    self.page.locator(f"html[data-theme={theme}]").wait_for(timeout=PATIENCE)
                for violation in self._violations():
                    found.setdefault(violation, []).append(f"{device} {theme}")
        # What is wrong everywhere is told once.
        self.faults += [f"axe, {', '.join(where)}: {violation}" for violation, where in found.items()]
        self.page.emulate_media(color_scheme="light")

    def _violations(self) -> list[str]:
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations'], preload: false})")
        faults = []
        for violation in found["violations"]:
            if violation["impact"] in GRAVE:
                where = "; ".join(" ".join(map(str, node["target"])) for node in violation["nodes"][:3])
                faults.append(
                    f"{violation['impact']}: {violation['help']} ({len(violation['nodes'])} times: {where})"
                )
        return faults

    def check_widths(self) -> None:
        """See that the page fits a phone and a desk without scrolling sideways."""
        for device, width in WIDTHS.items():
            self.page.set_viewport_size({"width": width, "height": 800})
            self.page.evaluate(TWO_FRAMES)
            # Where it is the body that scrolls, the document's own width says nothing.
            over = self.page.evaluate(
                "() => Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
            )
            if over > width:
                self.faults.append(f"is {over} px wide on a {device} of {width} px")

    def check_print(self) -> None:
        """Print the page on A4 and see that all figures are on paper, whole, and none is too large."""
        self.page.set_viewport_size(PAPER)
        self.page.emulate_media(media="print")
        self.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")  # unfolds what is folded
        figures = self.page.locator("img:visible").evaluate_all(
            "all => all.map(i => [i, i.getBoundingClientRect()])"
            ".map(([i, box]) => ({name: i.alt, right: box.right, height: box.height}))"
        )
        for figure in figures:
            if figure["right"] > PAPER["width"] + 1 or figure["height"] > PAPER["height"]:
                self.faults.append(f"figure larger than a sheet of paper: {figure['name'][:60]}")
        paper = self.page.pdf(format="A4", margin=dict.fromkeys(("top", "right", "bottom", "left"), "10mm"))
        if (pieces := printed_images(paper)) != len(figures):
            self.faults.append(f"prints {len(figures)} figures in {pieces} pieces: some are cut or missing")
        self.page.emulate_media(media="screen")

    def close(self) -> None:
        """Close the page."""
        self.page.close()


def check_page(context: BrowserContext, path: Path, root: Path, *, thorough: bool = True) -> Visit:
    """Open one page and check it; without `thorough`, leave out what takes long: axe and printing."""
    visit = Visit(context, path, root)
    visit.check_formulas()
    visit.check_sliders()
    if thorough:
        visit.check_accessibility()
        visit.check_print()
    visit.check_widths()
    visit.close()
    return visit


def check_search(context: BrowserContext, root: Path, term: str, expected: str) -> list[str]:
    """Search the book for a term and return a fault unless a page with this title is found."""
    path = root / "search.html"
    if not path.is_file():
        return ["there is no search page"]
    visit = Visit(context, path, root)
    visit.page.goto(f"{path.as_uri()}?q={term}", wait_until="load")
    try:
        visit.page.locator("#search-results li a", has_text=expected).first.wait_for(timeout=PATIENCE)
    except TimeoutError:
        found = visit.page.locator("#search-results li a").all_inner_texts()
        visit.faults.append(f"a search for {term!r} does not find {expected!r}, only {found}")
    visit.close()
    return [f"search: {fault}" for fault in visit.faults]


def check_gallery(context: BrowserContext, path: Path, root: Path) -> list[str]:
    """Follow the first picture of the gallery and return a fault unless the code that drew it can be read."""
    if not path.is_file():
        return ["there is no gallery"]
    visit = Visit(context, path, root)
    try:
        visit.page.locator(".gallery-card a:has(img)").first.click()
        cell = visit.page.locator(".cell:has(figure:target)")
        cell.wait_for()
        visit.page.wait_for_load_state()
        cell.locator(".cell_input").wait_for(timeout=PATIENCE)
    except TimeoutError:
        visit.faults.append(f"its first picture leads to {visit.page.url}, where no code is unfolded")
    visit.close()
    return [f"gallery: {fault}" for fault in visit.faults]


def open_window(playwright: Playwright, chromium: str) -> BrowserContext:
    """Start the browser and return a window of it, as wide as a phone and without a network."""
    browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS, timeout=PATIENCE)
    # A page is opened on a phone, as many readers do: what it finds out about its width then has to be right.
    window = browser.new_context(offline=True, viewport={"width": WIDTHS["phone"], "height": 800})
    window.set_default_timeout(PATIENCE)
    return window


def picture(box: Locator) -> list[tuple[str, str]]:
    """Return description and source of each image that a slider shows now."""
    visible: list[list[str]] = box.locator("img").evaluate_all(
        "all => all.filter(i => i.getClientRects().length).map(i => [i.alt, i.src])"
    )
    return [(alt, source) for alt, source in visible]


def printed_images(pdf: bytes) -> int:
    """Count how often the pages of a PDF by Chromium draw an image; one across two sheets is drawn on both.

    Chromium names an image after the number of its object in the file, and packs the pages' drawing commands.
    """
    objects = re.findall(rb"^(\d+) 0 obj\s*<<([^\0]*?)>>", pdf, flags=re.MULTILINE)
    images = {number for number, entries in objects if b"/Subtype /Image" in entries}
    drawn = 0
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, flags=re.DOTALL):
        try:
            commands = zlib.decompress(stream)
        except zlib.error:
            continue  # a font or an image
        drawn += sum(number in images for number in re.findall(rb"/X(\d+) Do", commands))
    return drawn
