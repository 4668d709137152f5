"""What the command line leaves on disk: rows of tables and pictures, each whole or not there."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from invlib.core.files import append, appending, atomic_write, png_bytes, regular
from invlib.errors import DataError


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a tab-separated table, which is made with its heading where it is missing.

    Raises:
        DataError: the table has other columns, or cannot be read or written.
    """
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    with appending(path, "table", wait=True) as file:
        before = file.read()
        _check(_parsed(before, path), path, row)
        if not before:
            writer.writerow(row)
        elif not before.endswith(b"\n"):
            text.write("\n")
        writer.writerow(row.values())
        append(file, text.getvalue().encode(), f"table {path}")


def check_table(path: Path, columns: Iterable[str]) -> None:
    """Raise DataError where a table is there that has other columns, or cannot be read."""
    _check(_rows(path), path, columns)


def _check(rows: list[list[str]], path: Path, columns: Iterable[str]) -> None:
    if rows and rows[0] != list(columns):
        raise DataError(
            f"table {path} has columns {' '.join(rows[0])}; expected {' '.join(columns)} "
            "(give another --name or folder)"
        )


def column(path: Path, name: str) -> list[str]:
    """Return one column of a table, nothing where there is no table."""
    heading, *rows = _rows(path) or [[name]]
    return [row[heading.index(name)] for row in rows] if name in heading else []


def _rows(path: Path) -> list[list[str]]:
    regular(path, "table")
    try:
        return _parsed(path.read_bytes(), path) if path.exists() else []
    except OSError as error:
        raise DataError(f"table {path} cannot be read: {error}") from error


def _parsed(text: bytes, path: Path) -> list[list[str]]:
    try:
        return list(csv.reader(io.StringIO(text.decode(), newline=""), delimiter="\t"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"table {path} cannot be read: {error}") from error


def save_image(path: Path, image: Tensor) -> None:
    """Save one image ``(C, H, W)`` in [0, 1] as PNG, which only its owner can read.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error
    atomic_write(path, lambda beside: beside.write_bytes(png_bytes(image[None])), private=True)
