"""Images by name: embedded samples, folders, and torchvision's data sets."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from torch import Tensor

from invlib.core.optional import torchvision
from invlib.data import files as _files
from invlib.data import names
from invlib.errors import ConfigError, DataError, DeviceError, UnknownNameError
from invlib.settings import checked, whole

_LOG = logging.getLogger("invlib")
_PACKAGE = Path(__file__).resolve().parents[1]
_SAMPLES = {
    "photos224": (4, 224, 224, 3),
    "photos64": (4, 64, 64, 3),
    "photos32": (4, 32, 32, 3),
    "patches32": (60, 32, 32, 3),
    "fashion": (100, 28, 28),
}
# name of the class in torchvision.datasets: (slug, sides of its images in pixels)
_SETS = {
    "CIFAR10": ("cifar10", 32),
    "CIFAR100": ("cifar100", 32),
    "MNIST": ("mnist", 28),
    "FashionMNIST": ("fashion-mnist", 28),
    "ImageNet": ("imagenet", 224),
}
_Side = Annotated[int, whole("a whole number from 1 to 10,000", lambda n: 1 <= n <= 10_000)]
_NPZ = "an .npz with x, uint8 (N, H, W, C) or (N, H, W), and y, integers (N,)"


def resource(name: str) -> Path:
    """Return the path of a file of the project's data folder, in a checkout and in an installed wheel.

    Args:
        name: path relative to that folder, such as ``"samples.npz"``.

    Raises:
        DataError: where no such file exists or the path leaves that folder; the message names the places
            that were looked at.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{name!r} leaves the data folder; expected a path inside it")
    places = [_PACKAGE / "_data" / name, _PACKAGE.parent / "data" / name]
    for place in places:
        if place.exists():
            return place
    raise DataError(f"{name!r} is missing: expected it at {places[1]} (checkout) or {places[0]} (installed)")


def sample_names() -> list[str]:
    """Return the names that `samples` knows."""
    return list(_SAMPLES)


def slug(name: str) -> str:
    """Return the short name of a data set that files carry, such as ``"fashion-mnist"`` for FashionMNIST.

    Raises:
        UnknownNameError: where `load` knows no data set of that name.
    """
    if not isinstance(name, str) or name not in _SETS:
        raise UnknownNameError(f"no data set {name!r}; known: {', '.join([*_SETS, *_SAMPLES])}")
    return _SETS[name][0]


def samples(name: str, indices: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Return embedded images, which need no network, and their labels.

    A photograph's label is its row; a patch's label is its row modulo 10, an arbitrary number; those of
    ``"fashion"`` are Fashion-MNIST's classes. Fashion-MNIST images have 28×28 pixels and come with two black
    pixels on each side, 32×32, the size that networks for small images expect.

    Args:
        name: one of `sample_names`.
        indices: rows to return, in this order; all where None.

    Returns:
        Images (N, C, H, W) in [0, 1] and labels (N,).

    Raises:
        UnknownNameError: where there is no sample of that name.
        ConfigError: where an index is out of range.
        DataError: where the sample file is missing or corrupt.

    Taught in: chapter 1
    """
    if name not in _SAMPLES:
        raise UnknownNameError(f"no sample {name!r}; known: {', '.join(_SAMPLES)}")
    shape = _SAMPLES[name]
    path = resource("samples.npz")
    x = _files.read_array(path, name, f"uint8 {shape}")
    if x.dtype != np.uint8 or x.shape != shape:
        raise DataError(f"{path}: {name} is {x.dtype} {x.shape}, expected uint8 {shape}")
    if name == "fashion":
        y = _files.read_array(path, "fashion_labels", f"integers {shape[:1]}")
        if y.dtype.kind not in "iu" or y.shape != shape[:1]:
            raise DataError(f"{path}: fashion_labels is {y.dtype} {y.shape}, expected integers {shape[:1]}")
    else:
        y = np.arange(len(x)) % 10
    return _files.to_tensors(x, y, indices, name)


def load(
    name: str,
    *,
    split: str = "test",
    root: str | os.PathLike[str] | None = None,
    indices: Sequence[int] | None = None,
    download: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return a data set by its name.

    An embedded sample of that name comes first. Else the folder that you give is looked at, which is
    `root` or the environment variable ``INVLIB_DATA``, for ``<slug>_<split>.npz`` (``x`` uint8 (N, H, W, C)
    or (N, H, W), ``y`` integers), then for ``<slug>/<split>/<class>/<image files>``, then for what
    torchvision keeps there. At last torchvision downloads the data set, into that folder or the user's
    cache. MNIST and FashionMNIST come padded to 32×32, like the sample ``"fashion"``.

    Args:
        name: an embedded sample, or CIFAR10, CIFAR100, MNIST, FashionMNIST or ImageNet.
        split: ``"train"`` or ``"test"`` (ImageNet's validation images).
        root: the folder to look at, before ``INVLIB_DATA``.
        indices: rows to return, in this order; all where None.
        download: whether the network may be used.

    Returns:
        Images (N, C, H, W) in [0, 1] and labels (N,).

    Raises:
        UnknownNameError: where there is no data set of that name.
        ConfigError: where `split` is unknown or an index out of range.
        DataError: where the data set is nowhere to be had; the message says what failed and what to do.
    """
    if isinstance(name, str) and name in _SAMPLES:
        return samples(name, indices)
    file = f"{slug(name)}_{split}.npz"
    kept = _on_disk(name, split, root, indices)
    if kept is not None:
        return kept
    place = data_folder(root)
    help_ = f"Set INVLIB_DATA to a folder that holds {file} ({_NPZ}), or a copy that torchvision made."
    if name == "ImageNet" or not download:
        why = "must be fetched by hand" if name == "ImageNet" else "may not be downloaded (download=False)"
        raise DataError(f"{name} ({split}) is not in {place} and {why}. {help_}")
    try:
        _files.download(name, split, place)
    except (OSError, RuntimeError, DeviceError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{name} ({split}) could not be downloaded to {place} ({reason}). {help_}") from error
    kept = _on_disk(name, split, place, indices)
    if kept is None:
        raise DataError(f"{name} ({split}) was downloaded to {place}, but torchvision cannot read it there")
    return kept


def default(
    *, split: str = "test", root: str | os.PathLike[str] | None = None, indices: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, str]:
    """Return CIFAR10 where it is on this disk, else the embedded patches, and which of the two it is.

    For code that needs some small colour images and was not told which. Nothing is downloaded. Where patches
    take the place of CIFAR10, the logger ``invlib`` says so in one line.

    Returns:
        Images (N, C, 32, 32) in [0, 1], labels (N,) and the name, ``"CIFAR10"`` or ``"patches32"``.

    Raises:
        ConfigError: where `split` is unknown or an index out of range.
        DataError: where a file is there but corrupt.
    """
    kept = _on_disk("CIFAR10", split, root, indices)
    if kept is not None:
        return *kept, "CIFAR10"
    _LOG.warning("CIFAR-10 is not on this disk; shown instead: %s.", describe("patches32"))
    return *samples("patches32", indices), "patches32"


def folder(
    path: str | os.PathLike[str], *, size: _Side | None = None, indices: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the images of a folder, in the order of their names.

    Args:
        path: image files, all of them labelled 0, or one subfolder of image files for each class, numbered in
            the order of their names.
        size: sides in pixels, 1 to 10,000: the shorter side is scaled to it and the middle is cut out. Where
            it is None, all images must have one size.
        indices: which images to read, in this order; all where None.

    Returns:
        RGB images (N, 3, H, W) in [0, 1] and labels (N,).

    Raises:
        ConfigError: where an index or the size is out of range.
        DataError: where the folder has no images, one cannot be read, or their sizes differ.
    """
    size = checked("folder size", size, _Side | None)
    path = Path(checked("folder path", path, str | os.PathLike))
    return _files.read_images(_files.list_images(path), size, indices, str(path))


def class_names(name: str) -> list[str]:
    """Return what the labels of a data set or an embedded sample mean, in order.

    Raises:
        UnknownNameError: where the classes of that name have no meaning or are unknown.

    Taught in: chapter 1
    """
    if name == "ImageNet":
        weights: Any = torchvision().models.ResNet18_Weights
        return list(weights.IMAGENET1K_V1.meta["categories"])
    if name not in names.CLASSES:
        raise UnknownNameError(
            f"no class names for {name!r}; known: {', '.join([*names.CLASSES, 'ImageNet'])}"
        )
    return list(names.CLASSES[name])


def describe(name: str, index: int | None = None) -> str:
    """Return what a data set, an embedded sample or one image of it is, for captions.

    >>> describe("photos32", 0)
    "photograph 'astronaut' (NASA, public domain), 32×32"

    Args:
        name: as for `load`.
        index: one row of it; the whole set where None.

    Raises:
        UnknownNameError: where nothing has that name.
        ConfigError: where the index is out of range.
    """
    if name not in _SAMPLES:
        slug(name)
        return names.TITLES[name] + ("" if index is None else f", image {index}")
    if index is None:
        return names.TITLES[name]
    _files.check_indices([index], _SAMPLES[name][0], name)
    if name.startswith("photos"):
        size = _SAMPLES[name][1]
        return f"photograph {names.PHOTOGRAPHS[index]}, {size}×{size}"
    if name == "fashion":
        label = int(samples(name, [index])[1])
        return f"Fashion-MNIST test image {names.CLASSES['fashion'][label]!r} (Zalando, MIT), padded to 32×32"
    boxes = _files.read_array(resource("samples.npz"), "patches32_boxes", "integers (60, 4)")
    which, _, _, side = boxes[index]
    return f"patch {index}, a {side}-pixel square of {names.PHOTOGRAPHS[which]}, 32×32"


def data_folder(root: str | os.PathLike[str] | None) -> Path:
    """Return the folder that data sets are looked for in: `root`, ``INVLIB_DATA`` or the user's cache."""
    given = root or os.environ.get("INVLIB_DATA")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "invlib"


def _on_disk(
    name: str, split: str, root: str | os.PathLike[str] | None, indices: Sequence[int] | None
) -> tuple[Tensor, Tensor] | None:
    """Return the data set from the folder that the user gives or the cache, or None where neither has it."""
    if split not in ("train", "test"):
        raise ConfigError(f"split={split!r} is unknown; expected 'train' or 'test'")
    place, (short, size) = data_folder(root), _SETS[name]
    if (root or os.environ.get("INVLIB_DATA")) and not place.is_dir():
        raise DataError(f"{place}: no such folder (from {'root' if root else 'INVLIB_DATA'})")
    file = place / f"{short}_{split}.npz"
    if file.exists():
        classes = len(names.CLASSES[name]) if name in names.CLASSES else 1000
        x = _files.read_array(file, "x", "uint8 (N, H, W, C) or (N, H, W)")
        y = _files.read_array(file, "y", "integers (N,)")
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            raise DataError(f"{file}: x is {x.dtype} {x.shape} and y {y.dtype} {y.shape}, expected {_NPZ}")
        if 0 in x.shape or (x.ndim == 4 and x.shape[3] not in (1, 3)):
            raise DataError(f"{file}: x has shape {x.shape}; expected {_NPZ}, N at least 1 and C 1 or 3")
        if y.min() < 0 or y.max() >= classes:
            raise DataError(f"{file}: y goes from {y.min()} to {y.max()}; expected 0 to {classes - 1}")
        return _files.to_tensors(x, y, indices, file.name)
    if (place / short / split).is_dir():
        files = _files.list_images(place / short / split)
        return _files.read_images(files, size, indices, name, mode="L" if size == 28 else "RGB")
    try:
        kept = _files.torchvision_set(name, split, place, download=False)
    except (OSError, RuntimeError, DeviceError):
        return None  # torchvision says in this way that the data set is not there
    if name == "ImageNet":
        return _files.read_images(kept.samples, size, indices, name)
    return _files.to_tensors(np.asarray(kept.data), np.asarray(kept.targets), indices, name)
