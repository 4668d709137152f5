"""Every figure and slider of the book.

A figure is returned, not shown, and no global setting of matplotlib is changed.
Images are `(N, C, H, W)` in [0, 1].
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
