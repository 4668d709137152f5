"""Files as every room writes them: whole or not at all, rows as JSON, images as PNG."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file beside a path, then rename it, so that the path never holds half a file.

    Where ``write`` or the renaming fails, the old file stays and nothing is left beside it.
    """
    beside = path.with_name(f"{path.name}.partial")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def png_bytes(images: Tensor) -> bytes:
    """Return images ``(N, C, H, W)`` in [0, 1], side by side, as the bytes of a PNG file."""
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    row = pixels.permute(2, 0, 3, 1).flatten(1, 2).numpy()  # (H, N·W, C)
    picture = Image.fromarray(np.ascontiguousarray(row[..., 0] if row.shape[2] == 1 else row))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def png(images: Tensor) -> str:
    """Return what `png_bytes` does, in base64."""
    return base64.b64encode(png_bytes(images)).decode("ascii")


def unpng(text: str, count: int) -> Tensor:
    """Return what `png` was given, to 8 bits: ``(count, C, H, W)`` in [0, 1]."""
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(text)))))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    height, width, channels = pixels.shape
    return pixels.reshape(height, count, width // count, channels).permute(1, 3, 0, 2).float() / 255


Row = dict[str, Any]


def encode(row: Row) -> bytes:
    """Return a row as a line; infinity and NaN, which JSON does not know, become words."""
    return (json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # float() reads it back
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
