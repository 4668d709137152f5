"""What the book adds to Sphinx, on a small book of one chapter."""

import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_notebook
from sphinx.application import Sphinx

EXTENSIONS = Path(__file__).parents[1] / "book" / "_ext"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
MODULE = '''"""A module."""


def taught(x):
    """Return :math:`x^2` of ``x``.

    Taught in: chapter 1
    """


def untaught(x):
    """Return nothing."""
'''
CHAPTER = """The first chapter
=================

.. _fig-pixel:

.. figure:: /pixel.png
   :alt: one red pixel

   One pixel, enlarged.
"""


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Build a book whose index is the given text and return the index as HTML, with the warnings."""
    monkeypatch.syspath_prepend(str(EXTENSIONS))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "chapters").mkdir()
    (tmp_path / "pixel.png").write_bytes(PIXEL)
    (tmp_path / "smallmodule.py").write_text(MODULE)
    (tmp_path / "chapters" / "1_first.rst").write_text(CHAPTER)
    (tmp_path / "library.rst").write_text(
        "Library\n=======\n\n.. automodule:: smallmodule\n   :members:\n\n:func:`invlib.observe`\n"
    )

    def made(text):
        (tmp_path / "index.rst").write_text(
            f"Book\n====\n\n{text}\n\n.. toctree::\n\n   chapters/1_first\n   library\n"
        )
        warnings = io.StringIO()
        app = Sphinx(
            tmp_path,
            None,
            tmp_path / "out",
            tmp_path / "doctrees",
            "html",
            confoverrides={"extensions": ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "taught", "gallery"]},
            status=None,
            warning=warnings,
        )
        app.build()
        page = lambda name: (tmp_path / "out" / name).read_text(encoding="utf-8")  # noqa: E731
        # Sphinx runs in this process more than once, and says so.
        lines = [line for line in warnings.getvalue().splitlines() if "already registered" not in line]
        return page, "\n".join(lines)

    yield made
    for name in ("taught", "gallery", "smallmodule"):
        sys.modules.pop(name, None)


def test_a_docstring_links_to_its_chapter(build):
    page, warnings = build("Text.")
    assert 'Taught in: <a class="reference internal" href="chapters/1_first.html">' in page("library.html")
    assert not warnings


def test_the_index_lists_what_a_chapter_teaches(build):
    page, warnings = build(".. taught-index::")
    index = page("index.html")
    assert 'href="library.html#smallmodule.taught"' in index
    listed = index.split("1 · The first chapter")[1].split("toctree-wrapper")[0]
    assert "smallmodule.taught" in listed
    assert "untaught" not in listed
    assert "1 · The first chapter" in index
    assert "\\(x^2\\)" in index
    assert "mathjax" in index.lower()  # or the formula would stay as it is
    assert not warnings


def test_the_gallery_shows_a_figure_and_leads_to_its_code(build):
    page, warnings = build(".. gallery::\n\n   fig-pixel\n")
    index = page("index.html")
    assert 'href="chapters/1_first.html?code#fig-pixel"' in index
    assert 'alt="one red pixel"' in index
    assert "One pixel, enlarged." in index
    assert 'src="_images/pixel.png"' in index
    assert not warnings


def test_a_figure_that_is_not_there_is_a_warning(build):
    _, warnings = build(".. gallery::\n\n   fig-gone\n")
    assert "gallery: there is no figure 'fig-gone' with a picture" in warnings


def test_a_page_is_timed_by_the_processor(monkeypatch):
    monkeypatch.syspath_prepend(str(EXTENSIONS))
    import processor_time
    from jupyter_cache.executors import utils

    def kernel(*_, **__):
        code = "import time\nwhile time.process_time() < 0.3:\n    pass"
        subprocess.run([sys.executable, "-c", code], check=True)

    monkeypatch.setattr(utils, "Timer", utils.Timer)  # to have it put back
    monkeypatch.setattr(utils, "executenb", kernel)
    processor_time.setup(None)
    before = os.times()
    seconds = utils.single_nb_execution(new_notebook(), None, None, False).time
    after = os.times()
    assert seconds >= 0.2
    children = [times.children_user + times.children_system for times in (before, after)]
    assert seconds == pytest.approx(children[1] - children[0])
