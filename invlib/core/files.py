"""Files as every room writes them: whole or not at all, rows under a lock, images as PNG."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from invlib.errors import DataError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_APPENDED = os.O_RDWR | os.O_CREAT | os.O_APPEND
# what Pillow raises for a file that is no image, or a damaged one
BROKEN_PICTURE = (
    *(OSError, ValueError, TypeError, SyntaxError, EOFError, OverflowError, MemoryError),
    *(struct.error, Image.DecompressionBombError),
)


def atomic_write(path: Path, write: Callable[[Path], Any], *, private: bool = False) -> None:
    """Let ``write`` make a file beside a path, then rename it, so that the path never holds half a file.

    Where ``write`` or the renaming fails, the old file stays and nothing is left beside it.

    Args:
        path: the file; its folder is there.
        write: makes a file at the path that it is given.
        private: whether only its owner may read it, as what shows private images.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        regular(path, "file")
        beside = path.with_name(f"{path.name}.partial")
        try:
            beside.unlink(missing_ok=True)
            os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
            write(beside)
            with beside.open("rb+") as file:
                os.fsync(file.fileno())  # else a power cut may leave an empty file under the new name
            if private:
                beside.chmod(0o600)  # safetensors makes the file anew
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except DataError:
        raise
    except (
        OSError,
        RuntimeError,
        ValueError,
        SafetensorError,
    ) as error:  # RuntimeError: torch, on a full disk
        raise DataError(f"{path} cannot be written: {_first_line(error)}") from error


def regular(path: Path, what: str) -> None:
    """Raise DataError where something is at a path that is no file: a folder, a device or a pipe."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise DataError(f"{what} {path} is {kind}; expected a file")


def check_writable(path: Path, *, size: int = 1 << 16) -> None:
    """Try to write beside a path, before work whose result goes there, and leave nothing.

    Args:
        path: the file that will be written; its folder is made where it is missing, and removed again.
        size: how many bytes to try.

    Raises:
        DataError: the path is a folder, its folder cannot be made, or the disk is full or read-only.
    """
    regular(path, "file")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError("it is read-only")
        beside = path.with_name(f"{path.name}.partial")
        try:
            beside.write_bytes(bytes(size))
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {_first_line(error)}") from error
    finally:
        for folder in made:  # the innermost first
            with suppress(OSError):
                folder.rmdir()


def _first_line(error: Exception) -> str:
    """Return the first line of a message: torch appends a page to it."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def appending(path: Path, what: str, *, wait: bool, private: bool = False) -> Iterator[IO[bytes]]:
    """Open a file for reading and appending rows, made where it is missing, while no other process may.

    A file that was made and is still empty at the end is removed, with the folders that were made for it.

    Args:
        path: the file.
        what: what it is called in messages.
        wait: whether to wait until another process that has it open closes it, or to refuse.
        private: whether a file that is made can be read by its owner alone.

    Raises:
        DataError: the path is no regular file, cannot be opened, or is open in another process.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    mode = 0o600 if private else 0o666
    try:
        regular(path, what)
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            new = not path.exists()
            # Unbuffered: a row is one write to the system, and nothing is left to be written after an error.
            file = os.fdopen(os.open(path, _APPENDED, mode), "a+b", 0)
            if lock(file, path, wait=wait):
                break
            file.close()
            if not wait:
                raise DataError(
                    f"{what} {path} is being written by another process; wait for its end, or give another"
                )
    except OSError as error:
        raise DataError(f"{what} {path} cannot be opened: {error}") from error
    with file:
        try:
            file.seek(0)
            yield file
        finally:
            if new and not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)
                for folder in made:  # the innermost first
                    with suppress(OSError):
                        folder.rmdir()


def lock(file: IO[bytes], path: Path, *, wait: bool = False) -> bool:
    """Lock an open file against other processes until it is closed, and say whether that was possible.

    Args:
        file: the file.
        path: where it was opened; if another file is there now, this one is the other's ``.old``.
        wait: whether to wait for another process.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except BlockingIOError:
        return False


def append(file: IO[bytes], text: bytes, what: str) -> None:
    """Append bytes to a file of `appending`; they are on the disk when this returns.

    Raises:
        DataError: the disk is full, or the file cannot be written; nothing of it is left then.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(text) != len(text):
            raise OSError("the disk is full")
        os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.ftruncate(file.fileno(), end)
        raise DataError(f"{what} cannot be written: {error}") from error


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
    """Return what `png` was given, to 8 bits: ``(count, C, H, W)`` in [0, 1].

    Raises:
        DataError: it is no picture of so many images.
    """
    try:
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(text)))))
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        height, width, channels = pixels.shape
        if width % count or pixels.dtype != torch.uint8:
            raise ValueError(f"{width} columns of {pixels.dtype} for {count} images")
    except BROKEN_PICTURE as error:
        raise DataError(
            f"a picture in a record cannot be read ({error}); expected what png() gave"
        ) from error
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
