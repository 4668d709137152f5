"""What an attack is, and what attacks share."""

from __future__ import annotations

import time
from dataclasses import fields, is_dataclass
from types import FunctionType
from typing import Protocol

import torch
from torch import Tensor, nn

from invlib.attacks.labels import infer
from invlib.core.observation import Observation
from invlib.core.reconstruction import Callback, Reconstruction
from invlib.settings import Checked


class Attack(Protocol):
    """Turns an observation into images, as every attack of invlib does, with one signature for all."""

    def __call__(
        self,
        model: nn.Module,
        observation: Observation,
        *,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Reconstruction:
        """Attack an observation.

        Args:
            model: the model that the client received; it is not changed.
            observation: what the server saw.
            generator: draws the starting points of a search; None makes one with seed 0.
            callback: called with `invlib.Progress` after each step of a search; returning True stops it.
            progress: show a progress bar of a search.
        """
        ...


class Settings(Checked):
    """Checks its fields, and prints a frozen dataclass by the fields that differ from their defaults."""

    def __repr__(self) -> str:
        assert is_dataclass(self)
        given = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        shown = [f"{name}={words(v)}" for name, v, default in given if v is not default and v != default]
        return f"{type(self).__name__}({', '.join(shown)})"


def words(value: object) -> str:
    """Return a setting as it is printed: functions by their name, tensors by their shape."""
    if isinstance(value, FunctionType):
        return value.__name__
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    if type(value) is tuple:
        return f"({', '.join(words(part) for part in value)}{',' if len(value) == 1 else ''})"
    return repr(value)


def known_labels(model: nn.Module, observation: Observation) -> Tensor:
    """Return the labels that the server was told, or else infers, int64 ``(N,)``, on the model's device.

    Raises:
        RecoveryError: they are hidden and the update does not tell them.
    """
    labels = infer(model, observation).labels if observation.labels is None else observation.labels
    return labels.to(next(model.parameters()).device)


def index_of_best(scores: Tensor) -> int:
    """Return which restart has the lowest finite score; 0 where none is finite."""
    return int(torch.where(torch.isfinite(scores), scores, torch.inf).argmin())


def closed_form(
    images: Tensor, labels: Tensor | None, score: float, *, objective: str, note: str, began: float
) -> Reconstruction:
    """Return the result of an attack without search that began at a time by `time.perf_counter`.

    Images are ``(N, C, H, W)`` in [0, 1]; ``objective`` says what the score measures.
    """
    return Reconstruction(
        images=images,
        labels=labels,
        score=score,
        objective=objective,
        trial_scores=torch.tensor([score]),
        trials=images[None],
        status="closed_form",
        seconds=time.perf_counter() - began,
        note=note,
    )
