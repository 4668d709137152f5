"""Show figures of other pages side by side, each a link to the place where it was made."""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)


class gallery(nodes.General, nodes.Element):
    """Where the figures will stand, once every page is read."""


class Gallery(SphinxDirective):
    """`{gallery}`: names of figures, one a line."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Leave a mark with the names."""
        names = [line.strip() for line in self.content if line.strip()]
        mark = gallery("", names=names)
        self.set_source_info(mark)
        return [mark]


def card(app: Sphinx, docname: str, name: str, mark: gallery) -> nodes.container | None:
    """Copy one figure's picture and caption and link both to the page that makes it."""
    page, anchor = app.env.get_domain("std").anonlabels.get(name, ("", ""))
    tree = app.env.get_doctree(page) if page else nodes.document("", "")
    figure = next((node for node in tree.findall(nodes.figure) if anchor in node["ids"]), None)
    image = next(iter(figure.findall(nodes.image)), None) if figure is not None else None
    if image is None:
        logger.warning("gallery: there is no figure %r with a picture", name, location=mark)
        return None
    # "?code" asks the page (book.js) to unfold the cell that drew the figure.
    address = f"{app.builder.get_relative_uri(docname, page)}?code#{anchor}"
    link = nodes.reference("", "", image.deepcopy(), refuri=address, internal=True)
    captions = [node.astext() for node in figure.findall(nodes.caption)]
    words = nodes.paragraph("", captions[0] if captions else "")
    source = nodes.paragraph("", "", classes=["gallery-source"])
    source += nodes.Text("The code is in ")
    source += nodes.reference("", app.env.titles[page].astext(), refuri=address, internal=True)
    return nodes.container("", link, words, source, classes=["gallery-card"])


def fill(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put the figures where the mark is."""
    for mark in list(doctree.findall(gallery)):
        cards = [card(app, docname, name, mark) for name in mark["names"]]
        mark.replace_self(
            nodes.container("", *(one for one in cards if one is not None), classes=["gallery"])
        )


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_node(gallery)
    app.add_directive("gallery", Gallery)
    app.connect("doctree-resolved", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
