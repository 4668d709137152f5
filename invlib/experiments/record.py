"""The record of an experiment: JSON lines that survive a kill at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from invlib.core.files import Row, append, appending, encode, lock, regular
from invlib.errors import DataError

_BEGINNING = b'{"experiment": "'  # of every row
_NUMBER = (int, float)
# What every row has, and of which type; "one for each image" are lists of one length.
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("experiment", "case", "key", "device"), str),
    **dict.fromkeys(("image", "evaluations", "candidates"), int),
    **dict.fromkeys(("settings", "columns"), dict),
    **dict.fromkeys(("psnr", "ssim", "floors", "rank_ssim", "rank_features"), list),
    **dict.fromkeys(("paper", "truth", "reconstruction"), (str, type(None))),
    "series": str,
    "sweep": (*_NUMBER, type(None)),
    "labels_right": (int, type(None)),
}
_SETTINGS = {
    **dict.fromkeys(("dataset", "split", "labels"), str),
    **dict.fromkeys(("steps", "restarts", "seed"), int),
    "reduced": bool,
}


class Record:
    """A record that this process alone may write to, and the rows that it holds.

    Args:
        path: the file, for messages.
        file: the file, opened for reading and appending, its torn last line cut off.
        rows: what it holds.
    """

    def __init__(self, path: Path, file: IO[bytes], rows: list[Row]) -> None:
        self.path, self.rows = path, rows
        self._file = file

    def append(self, row: Row) -> None:
        """Add a row, which is on the disk when this returns.

        Raises:
            DataError: the disk is full, or the file cannot be written; nothing of the row is left then.
        """
        append(self._file, encode(row), f"record {self.path}")
        self.rows.append(row)


@contextmanager
def opened(path: Path, *, fresh: bool = False, private: bool = False) -> Iterator[Record]:
    """Open a record for writing, with a lock on it, and cut off what a killed process left half written.

    Args:
        path: the file; made where it is missing, and removed again where it stays empty.
        fresh: begin anew; what is there is kept as ``NAME.old``, or ``NAME.old.2`` and so on.
        private: whether a file that is made can be read by its owner alone.

    Raises:
        DataError: another process has it open, or a line of it is no row of a record.
    """
    if fresh:
        _put_aside(path)
    with appending(path, "record", wait=False, private=private) as file:
        file.seek(0)
        text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        rows = _parse(whole, path)
        torn = text[len(whole) :]
        if not _BEGINNING.startswith(torn[: len(_BEGINNING)]):
            raise DataError(f"record {path} ends in {torn[:20]!r}; expected rows of a record")
        if len(whole) < len(text):
            os.ftruncate(file.fileno(), len(whole))
        yield Record(path, file, rows)


def _put_aside(path: Path) -> None:
    regular(path, "record")
    try:
        if not path.exists() or not path.stat().st_size:
            return
        with path.open("rb") as before:
            if not lock(before, path):  # not from under a process that writes to it
                raise DataError(f"record {path} is being written by another process; wait for its end")
            number, old = 1, path.with_name(f"{path.name}.old")
            while old.exists():
                number += 1
                old = path.with_name(f"{path.name}.old.{number}")
            os.replace(path, old)
    except OSError as error:
        raise DataError(f"record {path} cannot be put aside: {error}") from error


def read(path: str | os.PathLike[str]) -> list[Row]:
    """Return the rows of a record, and leave the file as it is; a half-written last line does not count.

    Raises:
        DataError: the file cannot be read, or a line of it is no row of a record.
    """
    regular(Path(path), "record")
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"record {path} cannot be read: {error}") from error
    return _parse(text[: text.rfind(b"\n") + 1], Path(path))


def _parse(text: bytes, path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"record {path}, line {number}: not JSON ({error}); expected a row") from error
        fault = _fault(row) if isinstance(row, dict) else f"it is a {type(row).__name__}"
        if fault:
            raise DataError(f"record {path}, line {number}: not a row of an experiment's record: {fault}")
        rows.append(row)
    return rows


def _fault(row: Row) -> str:
    """Return why a row is not one that a table or figure can be made of; nothing where it is."""
    for where, kinds in ((row, _KINDS), (row.get("settings"), _SETTINGS)):
        for name, kind in kinds.items():
            if not isinstance(where, dict) or name not in where:
                return f"it has no {name!r}"
            if not isinstance(where[name], kind):
                return f"{name!r} is {str(where[name])[:40]!r}"
    count = len(row["psnr"])
    same = ("floors", "rank_ssim", "rank_features")
    if (
        not (count or row.get("counts"))
        or any(len(row[name]) != count for name in same)
        or len(row["ssim"]) not in (0, count)
    ):
        return "its lists are not of one length"
    if not all(_is_number(value) for name in ("psnr", "ssim") for value in row[name]):
        return "'psnr' or 'ssim' holds what is no number"
    if not all(isinstance(rank, int | None) for name in same[1:] for rank in row[name]):
        return "a rank is no number"
    if not all(isinstance(word, str) for word in row["columns"].values()):
        return "'columns' holds what is no word"
    for floors in row["floors"]:
        if not isinstance(floors, dict) or not {"grey", "mean", "class"} <= floors.keys():
            return "'floors' lacks grey, mean or class"
        if not all(value is None or _is_number(value) for value in floors.values()):
            return "'floors' holds what is no number"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBER) or value in ("inf", "-inf", "nan")
