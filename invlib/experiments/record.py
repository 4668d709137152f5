"""The record of an experiment: JSON lines that survive a kill at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from invlib.core.files import Row, encode
from invlib.errors import DataError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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
        end = self._file.seek(0, os.SEEK_END)
        line = encode(row)
        try:
            if self._file.write(line) != len(line):
                raise OSError("the disk is full")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), end)
            raise DataError(f"record {self.path} cannot be written: {error}") from error
        self.rows.append(row)


@contextmanager
def opened(path: Path, *, fresh: bool = False) -> Iterator[Record]:
    """Open a record for writing, with a lock on it, and cut off what a killed process left half written.

    Args:
        path: the file; made where it is missing.
        fresh: begin anew; what is there is kept as ``NAME.old``.

    Raises:
        DataError: another process has it open, or a line of it is no row of a record.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh and path.exists():
            with path.open("rb") as before:
                _lock(before, path)  # not from under a process that writes to it
                os.replace(path, path.with_name(f"{path.name}.old"))
        # Unbuffered: a row is one write to the system, and nothing is left to be written after an error.
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise DataError(f"record {path} cannot be opened: {error}") from error
    with file:
        _lock(file, path)
        file.seek(0)
        text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.ftruncate(file.fileno(), len(whole))
        yield Record(path, file, _parse(whole, path))


def read(path: str | os.PathLike[str]) -> list[Row]:
    """Return the rows of a record, and leave the file as it is; a half-written last line does not count.

    Raises:
        DataError: the file cannot be read, or a line of it is no row of a record.
    """
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
        except ValueError as error:
            raise DataError(f"record {path}, line {number}: not JSON ({error}); expected a row") from error
        if not isinstance(row, dict) or not {"experiment", "case", "image", "key"} <= row.keys():
            raise DataError(f"record {path}, line {number}: not a row of an experiment's record")
        rows.append(row)
    return rows


def _lock(file: IO[bytes], path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have begun anew between opening and locking: this file is then its .old.
        mine = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except BlockingIOError:
        mine = False
    if not mine:
        raise DataError(
            f"record {path} is being written by another process; wait for its end, or give another --out"
        )
