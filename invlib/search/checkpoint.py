"""The state of a search on the disk, from which an unfinished run goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from invlib.core.files import atomic_write
from invlib.core.fingerprint import differences
from invlib.errors import ConfigError
from invlib.search.hooks import Hook
from invlib.search.state import RestartState, Search

FORMAT = 4  # of the file
EVERY = 30.0  # seconds between two writes


class Checkpoint(Hook):
    """A hook that writes the state of all restarts to a file now and then, and reads it at the start.

    Args:
        path: the file; removed when the search has ended.
        identity: what tells this run from others, as `describe` gives it.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, {**identity, "format": FORMAT}
        self.saved_at = time.monotonic()

    def begin(self, search: Search) -> None:
        """Go on where the file ends, if there is one.

        Raises:
            ConfigError: the file cannot be read, or is of another run.
        """
        if not self.path.exists():
            return
        try:
            saved = torch.load(self.path, map_location=search.problem.like.device, weights_only=True)
        except Exception as error:
            raise ConfigError(
                f"checkpoint {self.path} cannot be read ({error}); remove it to start anew"
            ) from error
        was = json.loads(saved.get("identity", "{}"))
        if was != self.identity:
            other = "; ".join(differences(was, self.identity))
            raise ConfigError(
                f"checkpoint {self.path} is of another run, with {other}; remove it or name another file"
            )
        search.states = [RestartState(**state) for state in saved["states"]]
        search.pruned = [RestartState(**state) for state in saved["pruned"]]

    def step(self, search: Search, state: RestartState) -> bool:
        """Write the file if it is time."""
        if time.monotonic() - self.saved_at >= EVERY:
            self.save(search)
        return False

    def end(self, search: Search, *, finished: bool) -> None:
        """Remove the file where the search is finished, else write it once more."""
        if finished:
            self.path.unlink(missing_ok=True)
        else:
            self.save(search)

    def save(self, search: Search) -> None:
        """Write the file beside the old one, and put it in its place."""
        saved = {
            "identity": json.dumps(self.identity),
            "states": [state.snapshot() for state in search.states],
            "pruned": [state.snapshot() for state in search.pruned],
        }
        atomic_write(self.path, lambda beside: torch.save(saved, beside))
        self.saved_at = time.monotonic()
