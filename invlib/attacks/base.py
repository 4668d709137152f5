"""What an attack is, and what attacks share."""

from __future__ import annotations

import time
from dataclasses import fields, is_dataclass, replace
from types import FunctionType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.labels import contradiction, infer
from invlib.attacks.losses import kind_of
from invlib.core.network import like, num_classes
from invlib.core.observation import Loss, Observation, words_of
from invlib.core.reconstruction import Callback, Reconstruction
from invlib.optim import objectives
from invlib.optim.objectives import Objective
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


def loss_of(attack_loss: Loss, observation: Observation) -> Loss:
    """Return the loss that counts: the attack's, or the observation's where the attack has the default."""
    known = observation.loss if attack_loss is F.cross_entropy else None
    return known or attack_loss


def with_loss(attack_loss: Loss, observation: Observation) -> Observation:
    """Return an observation with the loss that counts; where two were said, the doubt is among its notes."""
    loss, said = loss_of(attack_loss, observation), observation.loss
    if said is None or said == loss:
        return replace(observation, loss=loss)
    doubt = f"the attack's loss, {words_of(loss)}, counts, and not the observation's, {words_of(said)}"
    return replace(observation, loss=loss, notes=(*observation.notes, doubt))


def likelihood_of(objective: Objective, observation: Observation) -> Any:
    """Return the likelihood of the client's defences, to which an objective left at its default gives way.

    None where the client says of none, or the objective is another one.
    """
    return getattr(observation.protocol, "likelihood", None) if objective is objectives.cosine else None


def only_direction(objective: Objective, observation: Observation) -> bool:
    """Say whether no likelihood takes an objective's place, or one that is the cosine."""
    known = likelihood_of(objective, observation)
    return known is None or bool(known.directional)


def compared_by(objective: Objective, observation: Observation) -> str:
    """Return in words what compares two updates: an objective, or the likelihood that takes its place."""
    plain = only_direction(objective, observation)
    return words(objective) if plain else str(likelihood_of(objective, observation).words)


def with_labels(model: nn.Module, observation: Observation) -> Observation:
    """Return an observation with its labels, told or inferred, on the model's device.

    Where they were guessed, or contradict the update, that is among its notes.

    Raises:
        RecoveryError: they are hidden and the update does not tell them.
    """
    labels, some = observation.labels, like(model)
    if labels is None:
        found = infer(model, observation)
        labels, doubt = found.labels, str(found) if found.guess else None
        if doubt is None and (noise := getattr(observation.protocol, "noise", 0)):
            doubt = f"labels were inferred from an update with noise of {noise:g}"
    else:
        doubt = contradiction(model, observation)
    labels = labels.to(some) if labels.is_floating_point() else labels.to(some.device)
    notes = observation.notes if doubt is None else (*observation.notes, doubt)
    return replace(observation, labels=labels, notes=notes)


def of_classes(model: nn.Module, observation: Observation) -> bool:
    """Say whether labels are classes int64 ``(N,)``: those that were told, or those that the loss takes."""
    if (labels := observation.labels) is not None:
        return labels.ndim == 1 and not labels.is_floating_point()
    classes = num_classes(model, observation.image_shape)
    loss = loss_of(F.cross_entropy, observation)
    return kind_of(loss, observation.num_images, classes, like(model)) == "classes"


def known_labels(model: nn.Module, observation: Observation) -> Tensor:
    """Return the labels that the server was told, or else infers, on the model's device.

    Raises:
        RecoveryError: they are hidden and the update does not tell them.
    """
    labels = with_labels(model, observation).labels
    assert labels is not None
    return labels


def index_of_best(scores: Tensor) -> int:
    """Return which restart has the lowest finite score; 0 where none is finite."""
    return int(torch.where(torch.isfinite(scores), scores, torch.inf).argmin())


def closed_form(
    images: Tensor,
    labels: Tensor | None,
    score: float,
    *,
    objective: str,
    note: str,
    began: float,
    **more: Any,
) -> Reconstruction:
    """Return the result of an attack without search that began at a time by `time.perf_counter`.

    Images are ``(N, C, H, W)`` in [0, 1]; ``objective`` says what the score measures; ``more`` are further
    fields of the result.
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
        **more,
    )
