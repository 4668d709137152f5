"""What the command line leaves on disk: rows of tables and pictures, each whole or not there."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from invlib.core.files import atomic_write, png_bytes
from invlib.errors import DataError


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a tab-separated table, which is made with its heading where it is missing.

    Raises:
        DataError: the table has other columns, or cannot be read or written.
    """
    check_table(path, row)
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    if not path.exists():
        writer.writerow(row)
    writer.writerow(row.values())
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    _write(path, lambda beside: beside.write_text(before + text.getvalue(), encoding="utf-8"))


def check_table(path: Path, columns: Iterable[str]) -> None:
    """Raise DataError where a table is there that has other columns."""
    rows = _rows(path)
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
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"table {path} cannot be read: {error}") from error


def save_image(path: Path, image: Tensor) -> None:
    """Save one image ``(C, H, W)`` in [0, 1] as PNG.

    Raises:
        DataError: the file cannot be written.
    """
    _write(path, lambda beside: beside.write_bytes(png_bytes(image[None])))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, write)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error
