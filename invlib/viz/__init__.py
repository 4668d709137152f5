"""Every figure and slider of the book.

What draws takes the truth first (what measures takes it second) and images `(N, C, H, W)` in [0, 1]. It
returns a figure or a widget, which a notebook shows where a cell returns it, and changes no global setting.
"""

from invlib.viz.curves import bars, convergence, lines
from invlib.viz.figure import style
from invlib.viz.panels import panel
from invlib.viz.pictures import compare, filmstrip, grid
from invlib.viz.sliders import scrubber, wipe

__all__ = [
    "bars",
    "compare",
    "convergence",
    "filmstrip",
    "grid",
    "lines",
    "panel",
    "scrubber",
    "style",
    "wipe",
]
