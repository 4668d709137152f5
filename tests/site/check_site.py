"""Check every page of the built book as its readers get it: from disk, in Chromium, without a network.

Usage: python -m tests.site.check_site _build/html

Every page: no error in the console or in a script, no request for anything outside the book's folder, no link
or anchor that leads nowhere, no image without a description, no formula that cannot be set, no sideways
scrolling at 360 and 1280 pixels; every slider has a name and changes its picture.
Every page that was written, and the longest listing of source code: axe finds nothing serious or critical at
both widths in the light and in the dark theme, and no figure is cut when the page is printed.
The book: its search finds a known term, its gallery leads to unfolded code, its chapters can be downloaded as
notebooks, and its run times, in processor time, are within the budget and near what the chapters state.
The report of an audit: pages made of made-up reports pass as every page does.

Uses Debian's Chromium or the one that the environment variable CHROMIUM names.
"""

import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.site import browser, files, reports

SEARCH = ("honest-but-curious", "What the server sees")
CHAPTERS = Path(__file__).parents[2] / "chapters"


def main() -> int:
    """Check the site and return the exit status: 0 clean, 1 faults, 2 nothing could be checked."""
    if len(sys.argv) != 2 or not (root := Path(sys.argv[1]).resolve()).is_dir():
        print(f"expected the folder of a built book, got {sys.argv[1:]}", file=sys.stderr)
        return 2
    if (chromium := find_chromium()) is None:
        print(
            "Chromium was not found; install it (apt-get install chromium) or set CHROMIUM", file=sys.stderr
        )
        return 2
    began = time.perf_counter()
    pages = files.pages(root)
    faults = files.check_links(root)
    stated = {
        f"chapters/{path.stem}": files.stated_seconds(path) for path in sorted(CHAPTERS.glob("*.ipynb"))
    }
    faults += files.check_downloads(root, list(stated))
    slow, seconds = files.check_run_times(root / "book" / "runtimes.html", stated)
    faults += slow
    spared = other_listings(pages, root)

    folder = tempfile.TemporaryDirectory()
    reported = Path(folder.name).resolve()
    places = [(path, root) for path in pages] + [(path, reported) for path in reports.write(reported)]
    faults += files.check_links(reported)

    def visit(part: list[tuple[Path, Path]]) -> tuple[list[str], int]:
        """Visit pages in a window of their own; return the faults, and how many sliders were moved."""
        found, sliders = [], 0
        with sync_playwright() as playwright:
            window = browser.open_window(playwright, chromium)
            for path, home in part:
                page = browser.check_page(window, path, home, thorough=path not in spared)
                found += [f"{path.relative_to(home)}: {fault}" for fault in page.faults]
                sliders += page.sliders
            if part[0] == places[0]:
                found += browser.check_search(window, root, *SEARCH)
                found += browser.check_gallery(window, root / "book" / "gallery.html", root)
            window.browser.close()
        return found, sliders

    # Two browsers side by side, each driven by a thread.
    with ThreadPoolExecutor() as threads:
        visits = list(threads.map(visit, [places[::2], places[1::2]]))
    folder.cleanup()
    faults += sorted(fault for found, _ in visits for fault in found)
    sliders = sum(moved for _, moved in visits)
    for fault in faults:
        print(fault)
    print(
        f"{len(pages)} pages ({len(pages) - len(spared)} of them with axe and printed), "
        f"{len(places) - len(pages)} reports of an audit, {sliders} sliders, "
        f"chapters and pages computed in {sum(seconds.values()):.0f} s of processor time, "
        f"{len(faults)} faults, checked in {time.perf_counter() - began:.0f} s"
    )
    return 1 if faults or not pages else 0


def other_listings(pages: list[Path], root: Path) -> set[Path]:
    """Return the listings of source code but for the longest, which stands for all.

    They come from one template and differ in their code alone.
    """
    listings = [path for path in pages if path.relative_to(root).parts[0] == "_modules"]
    return set(sorted(listings, key=lambda path: path.stat().st_size)[:-1])


def find_chromium() -> str | None:
    """Return the path of the browser, or None where there is none."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


if __name__ == "__main__":
    sys.exit(main())
