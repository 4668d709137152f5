"""The state of a search on the disk, from which an unfinished run goes on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import warnings
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invlib.core.files import atomic_write
from invlib.core.fingerprint import differences
from invlib.core.reconstruction import History, Reconstruction
from invlib.errors import ConfigError, DataError, DoubtWarning
from invlib.search.hooks import Hook
from invlib.search.state import RestartState, Search

FORMAT = b"invlib checkpoint 5\n"  # the file's first line; the second is a hash of all that follows it
EVERY = 30.0  # seconds between two writes
_TRIED = 1 << 20  # bytes that have to fit on the disk at the start


def try_writing(path: Path) -> None:
    """Write something beside a path and remove it, to know before any work that a checkpoint can be kept.

    Raises:
        DataError: it cannot be written there.
    """
    beside = path.with_name(f"{path.name}.try") if path.name else path
    try:
        if path.exists() and not path.is_file():
            raise FileExistsError(0, "this is no regular file")
        _write(beside, bytes(_TRIED))
    except (OSError, ValueError) as error:
        raise DataError(
            f"checkpoint {str(path)!r} cannot be written ({_words(error)}); expected a file in a folder that "
            "exists and can be written to"
        ) from error
    finally:
        if path.name:
            with suppress(OSError, ValueError):
                beside.unlink()


class Checkpoint(Hook):
    """A hook that writes the state of all restarts to a file now and then, and reads it at the start.

    An attack whose search has several parts keeps the results of those that are done in it too.

    Args:
        path: the file, which its owner alone may read, for it holds pictures.
        identity: what tells this run from others, as `describe` gives it.

    Attributes:
        done: the results of earlier parts, each with the state of the generator after it.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.done: list[tuple[Reconstruction, Tensor]] = []
        self.saved_at, self.warned = time.monotonic(), False
        self._read: dict[str, list[RestartState]] = {}
        self._search: Search | None = None

    def open(self, device: torch.device) -> None:
        """Read the file, if there is one.

        Raises:
            ConfigError: it cannot be read, or is of another run.
            DataError: the operating system does not let it be read.
        """
        if not self.path.exists():
            return
        try:
            first, told, body = self.path.read_bytes().partition(FORMAT)
        except OSError as error:
            raise DataError(f"checkpoint {self.path} cannot be read ({_words(error)})") from error
        if first or not told:
            raise self._unreadable("it is no checkpoint, or one of another version of invlib")
        if hashlib.sha256(body[65:]).hexdigest().encode() + b"\n" != body[:65]:
            raise self._unreadable("its bytes are not those that were written")
        try:
            saved = torch.load(io.BytesIO(body[65:]), map_location=device, weights_only=True)
            was = json.loads(saved["identity"])
        except Exception as error:
            # Torch's own words advise to load it unsafely.
            raise self._unreadable(type(error).__name__) from None
        if was != self.identity:
            other = "; ".join(differences(was, self.identity))
            raise ConfigError(
                f"checkpoint {self.path} is of another run, with {other}; remove it or name another file"
            )
        self.done = [(_result(one["result"]), one["generator"].cpu()) for one in saved["done"]]
        self._read = {k: [RestartState(**state) for state in saved[k]] for k in ("states", "pruned")}

    def _unreadable(self, why: str) -> ConfigError:
        return ConfigError(f"checkpoint {self.path} cannot be read ({why}); remove it to start anew")

    def begin(self, search: Search) -> None:
        """Go on where the file ended."""
        if self._read.get("states"):
            vars(search).update(self._read)
        self._read, self._search = {}, search

    def step(self, search: Search, state: RestartState) -> bool:
        """Write the file if it is time."""
        if time.monotonic() - self.saved_at >= EVERY:
            self.keep()
        return False

    def end(self, search: Search, *, finished: bool) -> None:
        """Write the file once more where the search was stopped."""
        if not finished:
            self.keep()

    def finish(self, result: Reconstruction, generator: Tensor) -> None:
        """Keep the result of a part, after which another one may follow, and the generator's state."""
        self.done.append((result, generator))
        self._search = None
        self.keep()

    def remove(self) -> None:
        """Remove the file: there is nothing left to do."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            self._warn(f"cannot be removed ({_words(error)})")

    def keep(self) -> None:
        """Write the file as `save` does; where that fails, say so once and go on without."""
        try:
            self.save()
        except DataError as error:
            self.saved_at = time.monotonic()
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            self._warn(f"cannot be written ({_words(cause)}); the attack goes on without it")

    def save(self, search: Search | None = None) -> None:
        """Write the file beside the old one, and put it in its place."""
        search = search or self._search
        body = io.BytesIO()
        saved = {
            "identity": json.dumps(self.identity),
            "done": [{"result": _plain(result), "generator": state} for result, state in self.done],
            "states": [state.snapshot() for state in search.states] if search else [],
            "pruned": [state.snapshot() for state in search.pruned] if search else [],
        }
        torch.save(saved, body)
        told = hashlib.sha256(body.getbuffer()).hexdigest().encode() + b"\n"
        whole = FORMAT + told + body.getvalue()
        atomic_write(self.path, lambda beside: beside.write_bytes(whole), private=True)
        self.saved_at = time.monotonic()

    def _warn(self, words: str) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(f"checkpoint {self.path} {words}", DoubtWarning, stacklevel=2)


def _write(path: Path, content: bytes) -> None:
    """Make a file that its owner alone may read, and wait until it is on the disk."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"


def _plain(result: Reconstruction) -> dict[str, Any]:
    """Return a result as plain containers of tensors and numbers."""
    history = {f.name: getattr(result.history, f.name) for f in fields(History)}
    return {f.name: getattr(result, f.name) for f in fields(Reconstruction)} | {"history": history}


def _result(plain: dict[str, Any]) -> Reconstruction:
    """Undo `_plain`; a history stays on the CPU."""
    history: dict[str, Any] = {
        k: v.cpu() if isinstance(v, Tensor) else v for k, v in plain["history"].items()
    }
    return Reconstruction(**plain | {"history": History(**history)})
