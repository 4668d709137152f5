"""What the files of a built book tell without a browser: links, anchors, descriptions, run times."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Processor seconds on a quiet machine. Beside other work caches and hyperthreads are shared, and the same
# chapter has taken two and a half times as many.
CHAPTER_SECONDS = 90
BOOK_SECONDS = 15 * 60
BUSY = 3
# A description that is a file name is what a generator writes where the author wrote none.
FILE_NAME = re.compile(r"^\S*\.(png|svg|jpe?g|gif|webp)$", re.IGNORECASE)


@dataclass
class Document(HTMLParser):
    """What one page holds that others may point at, and what it points at itself."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    images: list[tuple[str, str | None]] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note anchors, links, images, and where a table's rows and cells begin."""
        found = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        self.links += [value for name in ("href", "src") if (value := found.get(name))]
        if tag == "img":
            self.images.append((found.get("src") or "", found.get("alt")))
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th") or (self._in_cell and tag not in ("tr", "table"))
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        """Note where a cell ends."""
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        """Collect the text of a table's cell."""
        if self._in_cell:
            self.rows[-1][-1] += data.strip()


def read(path: Path) -> Document:
    """Parse one page."""
    document = Document()
    document.feed(path.read_text(encoding="utf-8"))
    return document


def pages(root: Path) -> list[Path]:
    """Return every page of a built book; what lies in _static is material, not a page."""
    return sorted(path for path in root.rglob("*.html") if "_static" not in path.relative_to(root).parts)


def check_links(root: Path) -> list[str]:
    """Return a fault for each link into the book that leads nowhere and each image without a description."""
    documents = {path.resolve(): read(path) for path in pages(root)}
    faults = []
    for path, document in documents.items():
        name = path.relative_to(root.resolve())
        for link in dict.fromkeys(document.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue  # another site, or data inside the page
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                faults.append(f"{name}: {link} leads to no file")
            elif target in documents and unquote(parts.fragment) not in {"", *documents[target].anchors}:
                faults.append(f"{name}: {link} leads to no anchor")
        for source, alt in document.images:
            if not alt or not alt.strip() or FILE_NAME.match(alt.strip()):
                faults.append(f"{name}: image without a description: {source[:80]}")
    return faults


def stated_seconds(notebook: Path) -> int:
    """Return the run time that a chapter states."""
    found = re.search(r"\*\*Run time\*\*: about (\d+) s", notebook.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{notebook.name} states no run time, expected '**Run time**: about N s'")
    return int(found[1])


def check_run_times(page: Path, stated: dict[str, int]) -> tuple[list[str], dict[str, float]]:
    """Compare the table of run times with the budget and with what each chapter states.

    Returns:
        The faults, and the processor seconds of each page.
    """
    if not page.is_file():
        return [f"there is no page of run times at {page}"], {}
    rows = [row for row in read(page).rows if len(row) == 5]
    if not rows or rows[0][0] != "Document" or not rows[0][3].startswith("Run Time"):
        return [f"{page.name}: no table of run times was found"], {}
    seconds = {row[0]: float(row[3]) for row in rows[1:]}
    faults = [f"{page.name}: {chapter} is not in the table" for chapter in stated if chapter not in seconds]
    for name, value in seconds.items():
        expected = stated.get(name, CHAPTER_SECONDS)
        if value > BUSY * expected:
            faults.append(f"{page.name}: {name} took {value:.0f} s, more than {BUSY} times {expected} s")
    if (total := sum(seconds.values())) > BUSY * BOOK_SECONDS:
        faults.append(f"{page.name}: the book took {total:.0f} s, more than {BUSY} times {BOOK_SECONDS} s")
    return faults, seconds


def check_downloads(root: Path, chapters: list[str]) -> list[str]:
    """Return a fault for each chapter whose page has no link to its notebook."""
    faults = []
    for chapter in chapters:
        page = root / f"{chapter}.html"
        if not page.is_file():
            faults.append(f"{chapter}.html: the chapter has no page")
        elif not any(link.endswith(f"{chapter}.ipynb") for link in read(page).links):
            faults.append(f"{chapter}.html: no link to download the notebook")
    return faults
