"""Figures made of images: comparisons, grids, filmstrips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from invlib.core.reconstruction import Reconstruction
from invlib.errors import ConfigError
from invlib.metrics import matching_order, psnr
from invlib.viz.figure import NARROW, WIDTH, as_images, at_least, figure, same_length, same_shape, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Images = Tensor | np.ndarray
Drawn = Reconstruction | Images
NOT_FOUND = 0.93  # the grey of an image that an attack did not find


class Recording(Protocol):
    """Pictures and the step of each, as `invlib.Frames` records them."""

    steps: list[int]
    images: list[Tensor]


def decibels(images: np.ndarray, reference: np.ndarray) -> list[str]:
    """Return the PSNR of each image `(N, H, W, C)` as a caption."""
    values = psnr(*(torch.from_numpy(array).permute(0, 3, 1, 2) for array in (images, reference)))
    names = {"inf": "exact", "nan": "not found"}
    return [names.get(str(value), f"{value:.1f} dB") for value in values.tolist()]


def comparison(original: Images, reconstructions: Drawn | Mapping[str, Drawn]) -> dict[str, np.ndarray]:
    """Return an original and its reconstructions as arrays by name, all in the original's order.

    An image that an attack did not find is all NaN.
    """
    rows = {"original": as_images(original, "original")}
    named = reconstructions if isinstance(reconstructions, Mapping) else {"reconstruction": reconstructions}
    if not named:
        raise ConfigError("reconstruction is empty; expected at least one set of images")
    for name, drawn in named.items():
        if not isinstance(drawn, Reconstruction):
            rows[name] = as_images(drawn, name)
            same_shape(rows[name], rows["original"], name)
            continue
        rows[name] = np.full_like(rows["original"], np.nan)
        if len(drawn.images):
            found = as_images(drawn.images, name)
            same_shape(found[:1], rows["original"][:1], name)
            pair = (torch.from_numpy(array).permute(0, 3, 1, 2) for array in (found, rows["original"]))
            order = matching_order(*pair).numpy()
            rows[name][order >= 0] = found[order[order >= 0]]
    return rows


@figure
def compare(
    original: Images,
    reconstruction: Drawn | Mapping[str, Drawn],
    *,
    titles: Sequence[str] | None = None,
    max_images: int = 8,
) -> Figure:
    """Draw the originals above their reconstructions, with the PSNR under each.

    Args:
        original: `(N, C, H, W)` in [0, 1].
        reconstruction: what an attack returned, whose images are put in the original's order
            (`invlib.metrics.matching_order`) and may be fewer, or images that are in it; several by name for
            one row each.
        titles: one for each of the N images.
        max_images: draw no more than the first so many.

    Raises:
        ConfigError: where shapes, range or the number of titles do not fit.

    Example:
        >>> x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> len(compare(x, 0.9 * x).axes)
        4

    Taught in: chapter 1
    """
    at_least("max_images", max_images, 1)
    rows = comparison(original, reconstruction)
    reference = rows["original"]
    count = min(len(reference), max_images)
    if titles is not None:
        same_length("titles", titles, len(reference), "images")
    result, axes = _panels(len(rows), count, reference.shape[1] / reference.shape[2])
    for row, (name, images) in enumerate(rows.items()):
        axes[row, 0].set_ylabel(name)
        captions = decibels(images[:count], reference[:count])
        for column in range(count):
            show(axes[row, column], np.nan_to_num(images[column], nan=NOT_FOUND))
            if row > 0:
                axes[row, column].set_xlabel(captions[column])
    if titles is not None:
        for column in range(count):
            axes[0, column].set_title(titles[column])
    return result


@figure
def grid(images: Images, captions: Sequence[str] | None = None, *, columns: int = 8) -> Figure:
    """Draw images in rows, each with its caption below.

    Args:
        images: `(N, C, H, W)` in [0, 1].
        captions: one for each image.
        columns: images in a row.

    Raises:
        ConfigError: where shape, range, columns or the number of captions do not fit.

    Example:
        >>> figure = grid(torch.zeros(3, 1, 8, 8), ["a", "b", "c"], columns=2)
        >>> [axes.get_xlabel() for axes in figure.axes if axes.has_data()]
        ['a', 'b', 'c']

    Taught in: chapter 1
    """
    pictures = as_images(images)
    if captions is not None:
        same_length("captions", captions, len(pictures), "images")
    at_least("columns", columns, 1)
    columns = min(columns, len(pictures))
    result, axes = _panels(-(-len(pictures) // columns), columns, pictures.shape[1] / pictures.shape[2])
    for index, place in enumerate(axes.flat):
        if index < len(pictures):
            show(place, pictures[index])
            if captions is not None:
                place.set_xlabel(captions[index])
        else:
            place.set_axis_off()
    return result


@figure
def filmstrip(
    frames: Recording | Mapping[str, Images], *, count: int = 6, original: Images | None = None
) -> Figure:
    """Draw moments of a recording from left to right, one row for each image.

    Args:
        frames: what `invlib.Frames` recorded, or images by label.
        count: draw so many moments, evenly spaced, the first and the last among them.
        original: `(N, C, H, W)` in [0, 1], drawn last where given, and the PSNR of each frame with it.

    Raises:
        ConfigError: where there are no frames, or shapes, range or count do not fit.

    Example:
        >>> x = torch.zeros(1, 1, 8, 8)
        >>> figure = filmstrip({"0": x, "10": x, "20": x}, count=2)
        >>> [axes.get_title() for axes in figure.axes]
        ['0', '20']

    Taught in: chapter 2
    """
    labels, pictures, reference = moments(frames, count, original)
    columns = list(zip(labels, pictures, strict=True))
    if reference is not None:
        columns.append(("original", reference))
    result, axes = _panels(len(pictures[0]), len(columns), pictures[0].shape[1] / pictures[0].shape[2])
    for column, (label, images) in enumerate(columns):
        axes[0, column].set_title(label)
        for row, image in enumerate(images):
            show(axes[row, column], image)
        if reference is not None and images is not reference:
            for row, caption in enumerate(decibels(images, reference)):
                axes[row, column].set_xlabel(caption)
    return result


def moments(
    frames: Recording | Mapping[str, Images], count: int, original: Images | None, what: str = "step"
) -> tuple[list[str], list[np.ndarray], np.ndarray | None]:
    """Return labels and images `(N, H, W, C)` of `count` evenly spaced frames, and the original likewise."""
    at_least("count", count, 2)
    if isinstance(frames, Mapping):
        labels, images = [str(label) for label in frames], list(frames.values())
    else:
        labels, images = [f"{what} {step:,}" for step in frames.steps], list(frames.images)
        same_length("frames.steps", labels, len(images), "recorded images")
    if not images:
        raise ConfigError("frames is empty; expected at least one recorded image")
    places = np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int))
    labels = [labels[place] for place in places]
    pictures = [as_images(images[place], labels[index]) for index, place in enumerate(places)]
    for label, picture in zip(labels, pictures, strict=True):
        same_shape(picture, pictures[0], label)
    reference = None if original is None else as_images(original, "original")
    if reference is not None:
        same_shape(pictures[0], reference, "each frame")
    return labels, pictures, reference


def _panels(rows: int, columns: int, aspect: float) -> tuple[Figure, np.ndarray]:
    """Make a figure of panels that are as wide as a phone or, where they are many, a page allows."""
    import matplotlib.pyplot as plt

    side = min((NARROW if columns <= 4 else WIDTH) / columns, 1.8)
    return plt.subplots(
        rows, columns, figsize=(side * columns + 0.3, rows * (side * aspect + 0.3) + 0.2), squeeze=False
    )
