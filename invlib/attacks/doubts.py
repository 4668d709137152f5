"""What makes an observation or a result doubtful: facts of one call that contradict each other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from invlib.core.network import in_mode, is_random
from invlib.core.observation import Observation, words_of
from invlib.core.reconstruction import Reconstruction
from invlib.errors import DoubtWarning
from invlib.search.problem import Problem

_TOO_LONG = 1000.0  # times the length of a noise image's update


def doubted(result: Reconstruction, doubts: Iterable[str]) -> Reconstruction:
    """Return a result with what makes it doubtful, each once; Python warns of each once, too."""
    together = dict.fromkeys((*result.warnings, *doubts))
    for doubt in together:
        warnings.warn(doubt, DoubtWarning, stacklevel=1)
    unsaid = [doubt for doubt in together if doubt not in result.note]
    note = "; ".join(filter(None, [result.note, *unsaid]))
    return replace(result, warnings=tuple(together), note=note)


def says_nothing(observation: Observation) -> bool:
    """Say whether an update is all zero, as of a loss that is zero in the client's precision."""
    return not any(value.any() for value in observation.update.values())


def doubts_of(model: nn.Module, observation: Observation, *, closed: bool = False) -> list[str]:
    """Return what is doubtful about an observation that fits the model, without an evaluation of the client.

    Args:
        model: the model that the client received, unwrapped.
        observation: what the server saw.
        closed: whether it is for a closed form, which reads the update as the gradient itself.
    """
    doubts = list(observation.notes)
    if closed and (noise := getattr(observation.protocol, "noise", 0)):
        doubts.append(f"the client's noise of {noise:g} is read as a part of its gradient")
    sizes = [float(value.abs().max()) for value in observation.update.values() if value.numel()]
    largest, number = max(sizes, default=0.0), next(iter(observation.update.values())).dtype
    if says_nothing(observation):
        doubts.append(
            f"the update is all zero, as of a loss that is zero in {number}: it says nothing about the "
            "images, nothing is searched for, and no result is right"
        )
    elif number.is_floating_point and largest < torch.finfo(number).tiny:
        doubts.append(
            f"the update's largest number is {largest:.0e}, below the normal ones of {number}: "
            "the client's loss is all but zero, and much of its update is rounding"
        )
    training, dropout = observation.training_mode, getattr(observation.protocol, "dropout", "drawn")
    if dropout == "drawn" and is_random(
        model, observation.image_shape, training=training, count=observation.num_images
    ):
        mode = "training" if training else "evaluation"
        doubts.append(
            f"the model is random in {mode} mode (dropout, say): what the client drew is unknown, so that "
            "not even its own images score zero"
        )
    return doubts


def length_doubts(model: nn.Module, observation: Observation, problem: Problem) -> list[str]:
    """Return the doubt about an update that is far longer than what the client's step makes of noise."""
    noise = torch.rand(problem.shape, generator=torch.Generator().manual_seed(0)).to(problem.like)
    if problem.labels is None:
        return []
    with in_mode(model, training=observation.training_mode, seed=0):
        update = problem.update(problem.encode(noise), problem.labels)
    of_noise, sent = (
        math.hypot(*(float(part.detach().double().norm()) for part in parts))
        for parts in (update, problem.target)
    )
    if not 0 < of_noise < math.inf or sent <= _TOO_LONG * of_noise:
        return []
    return [
        f"the update is {sent / of_noise:.0e} times as long as what {words_of(observation.protocol)} makes "
        "of noise: are the client's step and the model the right ones?"
    ]
