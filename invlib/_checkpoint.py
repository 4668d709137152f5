"""The state of a race on the disk, from which an unfinished run goes on."""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from invlib._fingerprint import differences
from invlib._race import Race
from invlib.errors import ConfigError

CHECKPOINT_SECONDS = 30.0
FORMAT = 3  # of the file


class Checkpoint:
    """The state of all groups in one file, written beside and renamed.

    Args:
        path: the file; None writes nothing.
        identity: what `describe` says of the attack, the model, the observation and the starting points.
        race: what is saved and restored.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any], race: Race) -> None:
        self.path, self.identity, self.race = path, {**identity, "format": FORMAT}, race
        self.saved_at = time.monotonic()

    def load(self) -> None:
        if self.path is None or not self.path.exists():
            return
        try:
            saved = torch.load(
                self.path, map_location=self.race.groups[0].problem.like.device, weights_only=True
            )
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
        some = self.race.groups[0]
        for name in ("groups", "fallen"):
            restored = [copy.copy(some) for _ in saved[name]]
            for group, state in zip(restored, saved[name], strict=True):
                group.restore(state)
            setattr(self.race, name, restored)

    def save(self) -> None:
        if self.path is None:
            return
        beside = self.path.with_name(self.path.name + ".part")
        state = {
            "identity": json.dumps(self.identity),
            "groups": [g.snapshot() for g in self.race.groups],
            "fallen": [g.snapshot() for g in self.race.fallen],
        }
        torch.save(state, beside)
        os.replace(beside, self.path)
        self.saved_at = time.monotonic()

    def save_now_and_then(self) -> None:
        if self.path is not None and time.monotonic() - self.saved_at >= CHECKPOINT_SECONDS:
            self.save()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
