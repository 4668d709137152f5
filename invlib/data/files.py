"""Reading of images and labels from files, and torchvision's part in fetching them."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from invlib.core.files import BROKEN_PICTURE, regular
from invlib.core.optional import torchvision
from invlib.errors import ConfigError, DataError
from invlib.settings import shown

# what numpy raises for a file that is no .npz, or a damaged one
_BROKEN = (
    *(
        OSError,
        ValueError,
        EOFError,
        TypeError,
        AttributeError,
        SyntaxError,
        MemoryError,
        NotImplementedError,
    ),
    *(RecursionError, RuntimeError, zipfile.BadZipFile, zlib.error),
)
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_MOST_BYTES = 1 << 33  # of one array: images of ImageNet's size stay in files of their own
_MOST_ROWS = 1_000_000  # indices, which may be an endless iterator
_LARGEST = 10_000  # pixels, the sides that images are scaled to


def read_array(path: Path, key: str, expected: str) -> np.ndarray:
    """Read one array of an .npz; whatever is wrong with the file becomes a DataError.

    How large the array is, is compared with the file before any memory is asked for.
    """
    regular(path, "file")
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(f"{key}.npy")
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                if version not in _HEADERS:
                    raise ValueError(f"format {version}")
                shape, _, dtype = _HEADERS[version](file)
                held = entry.file_size - file.tell()
            claimed = math.prod(shape) * dtype.itemsize
            if dtype.hasobject or claimed != held or held > _MOST_BYTES:
                what = (
                    "Python objects" if dtype.hasobject else f"{claimed:,} bytes, of which {held:,} are there"
                )
                raise DataError(f"{path}: {key} claims to hold {what}; expected {expected}")
            with archive.open(entry) as file:
                array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    except KeyError as error:
        raise DataError(f"{path}: has no array {key!r}; expected {expected}") from error
    except DataError:
        raise
    except _BROKEN as error:
        # not numpy's own words, which advise to read the file unsafely
        raise DataError(
            f"{path}: corrupt ({type(error).__name__}); expected an .npz with {key}, {expected}"
        ) from error
    return array


def check_indices(indices: Sequence[int] | None, count: int, name: str) -> np.ndarray:
    """Return the rows to take as an array, all where none are named."""
    if count < 1:
        raise DataError(f"{name} has no images; expected at least one")
    try:
        asked = range(count) if indices is None else itertools.islice(indices, _MOST_ROWS)
        rows = np.array([index(i) for i in asked], dtype=np.int64)
    except (TypeError, OverflowError) as error:
        raise ConfigError(f"indices of {name} are {shown(indices)}; expected whole numbers") from error
    wrong = rows[(rows < 0) | (rows >= count)]
    if wrong.size or not rows.size:
        fault = f"index {wrong[0]} of {name} is out of range" if wrong.size else f"no index of {name} given"
        raise ConfigError(f"{fault}; expected 0 to {count - 1}")
    return rows


def to_tensors(
    x: np.ndarray, y: np.ndarray, indices: Sequence[int] | None, name: str
) -> tuple[Tensor, Tensor]:
    """Turn bytes (N, H, W[, C]) into images (N, C, H, W) in [0, 1]; 28×28 grey ones are padded to 32×32."""
    if indices is not None:
        rows = check_indices(indices, len(x), name)
        x, y = x[rows], y[rows]
    images = torch.from_numpy(np.ascontiguousarray(x))
    images = images[:, None] if images.ndim == 3 else images.movedim(3, 1)
    images = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    if images.shape[1:] == (1, 28, 28):
        images = F.pad(images, (2, 2, 2, 2))
    return images, torch.from_numpy(np.asarray(y, dtype=np.int64))


def list_images(base: Path) -> list[tuple[Path, int]]:
    """Return (file, label) of a folder of images, or of one subfolder for each class, ordered by name."""
    if not base.is_dir():
        raise DataError(f"{base}: no such folder; expected image files or one subfolder of them per class")
    try:
        files = [(file, 0) for file in _images_in(base)]
        if not files:
            classes = sorted(entry for entry in base.iterdir() if entry.is_dir())
            files = [(file, label) for label, entry in enumerate(classes) for file in _images_in(entry)]
    except OSError as error:
        raise DataError(f"{base}: cannot be read: {error}") from error
    if not files:
        raise DataError(f"{base}: no image files; expected some of {', '.join(sorted(_SUFFIXES))}")
    return files


def _images_in(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES and file.is_file())


def read_images(
    files: Sequence[tuple[str | Path, int]],
    size: int | None,
    indices: Sequence[int] | None,
    name: str,
    mode: str = "RGB",
) -> tuple[Tensor, Tensor]:
    """Read image files, scaled and cut to a square of `size` pixels where that is given.

    Images of 16 bits a pixel are rounded to 8.
    """
    if size is not None and not (isinstance(size, int) and 1 <= size <= _LARGEST):
        raise ConfigError(f"size is {size!r}; expected a whole number of pixels from 1 to {_LARGEST:,}")
    files = [files[row] for row in check_indices(indices, len(files), name)]
    pixels: list[np.ndarray] = []
    for file, _ in files:
        try:
            with Image.open(file) as opened:
                image = _in_8_bits(opened).convert(mode)
        except BROKEN_PICTURE as error:
            raise DataError(f"{file}: not an image that can be read ({error})") from error
        if size is not None:
            scale = size / min(image.size)
            width, height = (max(size, round(side * scale)) for side in image.size)
            left, top = (width - size) // 2, (height - size) // 2
            image = image.resize((width, height), Image.Resampling.LANCZOS)
            image = image.crop((left, top, left + size, top + size))
        pixels.append(np.asarray(image))
        if pixels[-1].shape != pixels[0].shape:
            raise DataError(
                f"{file}: {image.width}×{image.height} pixels, but {files[0][0]} has "
                f"{pixels[0].shape[1]}×{pixels[0].shape[0]}; give a size"
            )
    labels = np.array([label for _, label in files], dtype=np.int64)
    return to_tensors(np.stack(pixels), labels, None, name)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Return an image of at most 8 bits a channel; Pillow itself cuts larger numbers off at 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers (Pillow's mode {image.mode!r}) of unknown scale")
    return image


def torchvision_set(name: str, split: str, root: Path, *, download: bool) -> Any:
    """Open torchvision's data set of that name; where it is missing, RuntimeError or OSError."""
    if not download and not root.is_dir():
        raise FileNotFoundError(root)  # torchvision would make the folder
    make: Callable[..., Any] = getattr(torchvision().datasets, name)
    if name == "ImageNet":
        return make(str(root), split="train" if split == "train" else "val")
    return make(str(root), train=split == "train", download=download)


def download(name: str, split: str, root: Path) -> None:
    """Download beside, then rename: a broken connection leaves nothing that looks like a data set."""
    made = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=".partial-") as beside:
            torchvision_set(name, split, Path(beside), download=True)
            for entry in Path(beside).iterdir():
                if (root / entry.name).is_dir():
                    raise FileExistsError(f"{root / entry.name} is there but broken; remove it")
                os.replace(entry, root / entry.name)
    finally:
        if made and not any(root.iterdir()):
            root.rmdir()
