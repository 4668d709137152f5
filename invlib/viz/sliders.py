"""Pictures that a reader moves: sliders that work in a notebook and on a page with no kernel behind it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from invlib.core.optional import package
from invlib.errors import ConfigError
from invlib.viz.figure import png_uri
from invlib.viz.pictures import NOT_FOUND, Drawn, Images, Recording, comparison, decibels, moments

if TYPE_CHECKING:
    from ipywidgets import VBox

MAX_FRAMES = 20  # every frame is part of the page: more make it slow to load and no easier to read


def scrubber(
    frames: Recording | Mapping[str, Images],
    *,
    label: str = "step",
    alt: str = "reconstruction",
    original: Images | None = None,
    start: int = 0,
) -> VBox:
    """Make a slider that moves through pictures, in a live notebook and on the built page alike.

    Args:
        frames: what `invlib.Frames` recorded, or images `(N, C, H, W)` by label, one a place; of more than
            20 so many are shown, evenly spaced.
        label: what the slider moves through.
        alt: what the pictures show, for readers who do not see them; the frame's label is added.
        original: `(N, C, H, W)` in [0, 1], shown beside each frame where given, with the frame's PSNR.
        start: the frame that is shown first.

    Raises:
        ConfigError: where there are fewer than two frames, or shapes, range or start do not fit.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 1, 8, 8)
        >>> widget = scrubber({"0": x, "1e-4": x, "1e-2": x}, label="total variation weight")
        >>> widget.children[0].max
        2

    Taught in: chapter 2
    """
    labels, pictures, reference = moments(frames, MAX_FRAMES, original, label)
    if isinstance(frames, Mapping):
        labels = [f"{label} {name}" for name in labels]
    captions = labels
    if reference is not None:
        captions = [
            f"{name}: {', '.join(decibels(picture, reference))}"
            for name, picture in zip(labels, pictures, strict=True)
        ]
    pages = [
        page(picture, f"{alt}, {name}", caption, reference)
        for name, caption, picture in zip(labels, captions, pictures, strict=True)
    ]
    return _slider(pages, label, start)


def wipe(
    original: Images,
    reconstruction: Drawn,
    *,
    alt: str = "reconstruction",
    places: int = 11,
) -> VBox:
    """Make a slider that uncovers the original, from the left, over its reconstruction.

    Args:
        original: `(N, C, H, W)` in [0, 1].
        reconstruction: what an attack returned, in any order, or images in the original's order.
        alt: what the pictures show, for readers who do not see them.
        places: how many places the slider has, 2 to 20.

    Raises:
        ConfigError: where shapes, range or places do not fit.

    Example:
        >>> import torch
        >>> x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> len(wipe(x, 0.9 * x).children[1].children)
        11

    Taught in: chapter 1
    """
    if not isinstance(places, int) or not 2 <= places <= MAX_FRAMES:
        raise ConfigError(f"places must be from 2 to {MAX_FRAMES}, got {places}")
    reference, guess = comparison(original, reconstruction).values()
    guess = np.nan_to_num(guess, nan=NOT_FOUND)
    pages = []
    for place in range(places):
        share = place / (places - 1)
        columns = round(share * guess.shape[2])
        mixed = np.concatenate([reference[:, :, :columns], guess[:, :, columns:]], axis=2)
        text = f"{share:.0%} original, {1 - share:.0%} reconstruction"
        pages.append(_panel(mixed, f"{alt}: left {text}", text, 256))
    return _slider(pages, "original", places // 2)


def page(picture: np.ndarray, alt: str, caption: str, original: np.ndarray | None) -> str:
    """Return images `(N, H, W, C)` with their caption as HTML, with the original beside them where given."""
    panels = [_panel(picture, alt, caption, 192)]
    if original is not None:
        panels.append(_panel(original, f"original of the {alt.split(',')[0]}", "original", 192))
    # Single images stand side by side and shrink with the page; batches are wide and stand stacked.
    direction = "row" if len(picture) == 1 else "column"
    return f'<div style="display: flex; flex-direction: {direction}; gap: 8px">{"".join(panels)}</div>'


def _panel(images: np.ndarray, alt: str, caption: str, width: int) -> str:
    """Return images, each `width` CSS pixels wide where there is room, with a caption as HTML."""
    total = width * len(images)
    # dark-light is how the book's theme is told to leave a picture as it is in the dark.
    return (
        f'<div class="invlib-frame" style="flex: 0 1 auto; width: {total}px; min-width: 0; max-width: 100%">'
        f'<img class="dark-light" alt="{escape(alt)}" src="{png_uri(images)}" '
        'style="image-rendering: pixelated; width: 100%; height: auto; margin: 0">'
        f'<p style="margin: 2px 0; line-height: 1.4">{escape(caption)}</p></div>'
    )


def _slider(pages: list[str], label: str, start: int) -> VBox:
    widgets = package("ipywidgets", "viz")
    if len(pages) < 2:
        raise ConfigError("a slider needs at least two frames, got 1")
    if not 0 <= start < len(pages):
        raise ConfigError(f"start must be from 0 to {len(pages) - 1}, got {start}")
    slider = widgets.IntSlider(
        value=start,
        max=len(pages) - 1,
        description=label,
        readout=False,  # the place of a frame says nothing; its caption does
        layout=widgets.Layout(width="100%", max_width="420px"),
        style={"description_width": "initial"},
    )
    full = widgets.Layout(width="100%", min_width="0")  # as wide as the page, so that images shrink with it
    stack = widgets.Stack(
        [widgets.HTML(page, layout=full) for page in pages], selected_index=start, layout=full
    )
    # A link in the browser, not in Python: it works where no kernel runs.
    widgets.jslink((slider, "value"), (stack, "selected_index"))
    return widgets.VBox([slider, stack])
