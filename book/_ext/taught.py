"""Read "Taught in: chapter N" in the library's docstrings: as a link there, and as an index by chapter."""

import importlib
import inspect
import re
from pathlib import PurePosixPath

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

TAUGHT = re.compile(r"^Taught in: chapter (\d+)\s*$", re.MULTILINE)


class taught_index(nodes.General, nodes.Element):
    """Where the index will stand, once every page is read."""


class TaughtIndex(SphinxDirective):
    """`{taught-index}`: for each chapter, the functions and classes whose docstrings name it."""

    def run(self) -> list[nodes.Node]:
        """Leave a mark: the library's pages may not have been read yet."""
        return [taught_index("")]


def chapters(app: Sphinx) -> dict[str, str]:
    """Return the page of each chapter by its number, which is how its file begins."""
    found = (name for name in app.env.found_docs if name.startswith("chapters/"))
    return {PurePosixPath(name).name.split("_")[0]: name for name in sorted(found)}


def link_docstring(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Turn the line of a docstring into a link to the chapter."""
    pages = chapters(app)
    for index, line in enumerate(lines):
        if (match := TAUGHT.match(line)) and match[1] in pages:
            lines[index] = f"Taught in: :doc:`chapter {match[1]} </{pages[match[1]]}>`"


def documented(name: str) -> object:
    """Import what a page documents, by its full name."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            thing: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            thing = getattr(thing, part, None)
        return thing
    return None


def first_sentence(thing: object) -> list[nodes.Node]:
    """Return the first paragraph of a docstring, its formulas as formulas and its code as code."""
    text = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
    found: list[nodes.Node] = []
    for part in re.split(r"(:math:`[^`]*`|`+[^`]*`+)", text):
        if part.startswith(":math:"):
            found.append(nodes.math("", part.removeprefix(":math:").strip("`")))
        elif part.startswith("`"):
            found.append(nodes.literal("", part.strip("`")))
        else:
            found.append(nodes.Text(part))
    return found


def fill(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put the index where the mark is."""
    for mark in list(doctree.findall(taught_index)):
        by_chapter: dict[str, list[tuple[str, object]]] = {number: [] for number in chapters(app)}
        for name, entry in sorted(app.env.get_domain("py").objects.items()):
            text = inspect.getdoc(documented(name)) if entry.objtype in ("function", "class") else None
            if (match := TAUGHT.search(text or "")) and not entry.aliased:
                by_chapter.setdefault(match[1], []).append((name, entry))
        blocks: list[nodes.Node] = []
        for number, entries in by_chapter.items():
            page = chapters(app)[number]
            title = nodes.paragraph("", "", classes=["taught-chapter"])
            link = nodes.strong("", f"{number} · {app.env.titles[page].astext()}")
            title += make_refnode(app.builder, docname, page, None, [link])
            items = nodes.bullet_list()
            for name, entry in entries:
                code = nodes.literal("", name.removeprefix("invlib."))
                line = nodes.paragraph()
                line += make_refnode(app.builder, docname, entry.docname, entry.node_id, [code])
                line += [nodes.Text(" — "), *first_sentence(documented(name))]
                items += nodes.list_item("", line)
            blocks += [title, items]
        mark.replace_self(blocks)
        # Sphinx loads MathJax where it has read a formula, and these were not there to be read.
        if any(doctree.findall(nodes.math)):
            app.env.get_domain("math").data["has_equations"][docname] = True


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_node(taught_index)
    app.add_directive("taught-index", TaughtIndex)
    app.connect("autodoc-process-docstring", link_docstring)
    app.connect("doctree-resolved", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
