"""The state of a race on the disk, from which an unfinished run goes on."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path

import torch

from invlib._race import Race
from invlib.errors import ConfigError

CHECKPOINT_SECONDS = 30.0


class Checkpoint:
    """The state of all groups in one file, written beside and renamed."""

    def __init__(self, path: Path | None, fingerprint: str, race: Race) -> None:
        self.path, self.fingerprint, self.race = path, fingerprint, race
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
        if saved.get("fingerprint") != self.fingerprint:
            raise ConfigError(
                f"checkpoint {self.path} is of another run (other settings or another observation); "
                "remove it or name another file"
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
            "fingerprint": self.fingerprint,
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
