"""One look for every figure, and the checks that turn tensors into pictures."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from invlib.core.files import png
from invlib.core.optional import package
from invlib.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")

# Okabe and Ito's palette: told apart with any of the common colour vision deficiencies. Yellow is left out,
# it vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Lines differ in shape too, for print and for readers who see no colour.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 7.0  # inches, the width of the page's text column
NARROW = 5.2  # inches; a phone shows a figure of this width whole, with letters that can be read

_STYLE = {
    "figure.dpi": 144,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
_TOLERANCE = 1e-3  # a closed form overshoots [0, 1] by rounding; more than this is another scale


@contextmanager
def style() -> Iterator[None]:
    """Draw with the book's figure style inside the `with` block and leave matplotlib as it was after it."""
    matplotlib, cycler = package("matplotlib", "viz"), package("cycler", "viz").cycler
    settings: Any = {**_STYLE, "axes.prop_cycle": cycler(color=COLOURS)}
    with matplotlib.rc_context(settings):
        yield


def figure(draw: "Callable[P, Figure]") -> "Callable[P, Figure]":
    """Decorate a drawing function: the book's style, and one picture where a notebook shows its result."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> "Figure":
        # pyplot, although no state of it is used: importing it is what teaches Jupyter to show a Figure.
        plt = package("matplotlib.pyplot", "viz")

        before = set(plt.get_fignums())
        try:
            with style():
                return draw(*args, **kwargs)
        finally:
            # A notebook shows what a cell returns; a figure left open would appear twice.
            for number in set(plt.get_fignums()) - before:
                plt.close(number)

    return drawn


def as_images(images: Tensor | np.ndarray, name: str = "images") -> np.ndarray:
    """Check images `(N, C, H, W)` or `(C, H, W)` in [0, 1] and return them as an array `(N, H, W, 3 or 1)`.

    Raises:
        ConfigError: where the shape or the range is another.
    """
    if not isinstance(images, Tensor | np.ndarray):
        raise ConfigError(f"{name} must be a tensor or an array, got {type(images).__name__}")
    tensor = torch.as_tensor(images).detach().to("cpu", torch.float32)
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim != 4 or tensor.shape[1] not in (1, 3) or 0 in tensor.shape:
        raise ConfigError(
            f"{name} must have shape (N, C, H, W) or (C, H, W) with 1 or 3 channels, "
            f"got {tuple(images.shape)}"
        )
    low, high = float(tensor.min()), float(tensor.max())
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # written so that NaN fails too
        raise ConfigError(
            f"{name} must lie in [0, 1], found values from {low:.3g} to {high:.3g}; "
            "decode normalised images first, or clamp(0, 1) them"
        )
    return tensor.clamp(0, 1).permute(0, 2, 3, 1).numpy()


def same_shape(images: np.ndarray, reference: np.ndarray, name: str) -> None:
    """Raise `ConfigError` where two arrays of images `(N, H, W, C)` differ in shape."""
    if images.shape != reference.shape:
        given, expected = ((n, c, h, w) for n, h, w, c in (images.shape, reference.shape))
        raise ConfigError(f"{name} must have the original's shape {expected}, got {given}")


def at_least(name: str, value: int, least: int) -> None:
    """Raise `ConfigError` where a setting is no whole number, or too small."""
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")


def same_length(name: str, values: Sequence[object], expected: int, what: str) -> None:
    """Raise `ConfigError` where `values` does not have one entry for each of the `expected` things."""
    if len(values) != expected:
        raise ConfigError(f"{name} must have one entry for each of the {expected} {what}, got {len(values)}")


def show(axes: Any, image: np.ndarray) -> None:
    """Draw one image `(H, W, 3 or 1)` without smoothing, ticks or frame."""
    small = max(image.shape[:2]) <= 96
    axes.imshow(
        image.squeeze(-1) if image.shape[-1] == 1 else image,
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest" if small else "antialiased",
    )
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def png_uri(images: np.ndarray) -> str:
    """Lay images `(N, H, W, 3 or 1)` side by side, two clear pixels apart, and return a PNG data URI."""
    pictures = torch.from_numpy(images).permute(3, 1, 0, 2).expand(3, -1, -1, -1)  # (C, H, N, W)
    opaque = torch.cat([pictures, torch.ones_like(pictures[:1])])
    row = F.pad(opaque, (0, 2)).flatten(2)[..., :-2]
    return f"data:image/png;base64,{png(row[None])}"
