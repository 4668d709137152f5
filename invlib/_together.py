"""Many observations of one model, attacked in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from invlib._problem import Joined, Problem
from invlib._trials import Trials, run_races
from invlib.errors import ConfigError
from invlib.observation import Observation, in_mode, stackable
from invlib.reconstruction import Reconstruction

if TYPE_CHECKING:
    from invlib.matching import GradientMatching

Finish = Callable[[Problem, Trials, Observation, float], Reconstruction]


def attack_together(
    attack: GradientMatching,
    model: nn.Module,
    observations: Sequence[Observation],
    generators: Sequence[torch.Generator] | None,
    finish: Finish,
    *,
    progress: bool,
) -> list[Reconstruction]:
    """Run `GradientMatching.together`, whose arguments and errors these are.

    Args:
        attack: what is run.
        model: the model that every client received.
        observations: what the server saw.
        generators: one for each observation, or None.
        finish: makes a reconstruction of the trials of one observation.
        progress: show a progress bar.
    """
    began = time.perf_counter()
    _check(attack, observations)
    chosen = generators or [torch.Generator().manual_seed(0) for _ in observations]
    if len(chosen) != len(observations):
        raise ConfigError(
            f"generators has {len(chosen)} entries; expected one for each of {len(observations)} observations"
        )
    pairs = list(zip(observations, chosen, strict=True))
    if not (attack.optimizer.together and stackable(observations[0].protocol)):
        return [attack(model, o, generator=g, progress=progress) for o, g in pairs]
    for observation in observations:
        observation.validate(model)
    parts = [attack._problem(model, o) for o in observations]
    starts = [attack._starts(p, o, g) for p, (o, g) in zip(parts, pairs, strict=True)]
    common = {f.name: getattr(parts[0], f.name) for f in fields(Problem)}
    joined = Joined(**common, parts=tuple(parts), guesses=attack.restarts)
    with in_mode(model, training=observations[0].training_mode):
        trials = run_races(
            attack, joined, [torch.cat(some) for some in zip(*starts, strict=True)], progress=progress
        )
        found = [
            finish(part, one, observation, began)
            for part, one, observation in zip(parts, trials, observations, strict=True)
        ]
    share = (time.perf_counter() - began) / len(found)
    return [replace(one, seconds=share) for one in found]


def _check(attack: GradientMatching, observations: Sequence[Observation]) -> None:
    if not observations:
        raise ConfigError("observations is empty; expected at least one")
    if attack.engine == "compiled" and (attack.tolerance, attack.patience) != (None, None):
        raise ConfigError(
            f"GradientMatching has tolerance={attack.tolerance} and patience={attack.patience} with "
            "engine='compiled', which would compile anew whenever one of many observations ends; expected "
            "neither of them, or engine='auto'"
        )
    if isinstance(attack.init, Tensor):
        raise ConfigError("GradientMatching init is a tensor; expected a name for many observations together")
    if attack.layers.which == "largest":
        raise ConfigError(
            "GradientMatching layers are the largest, which differ from one update to the next; expected "
            "others for many observations together"
        )
    for name in ("protocol", "num_images", "image_shape", "normalization", "training_mode"):
        first = getattr(observations[0], name)
        for k, observation in enumerate(observations):
            value = getattr(observation, name)
            if value != first:
                raise ConfigError(f"observation {k} has {name} {value}; expected {first}, as the first has")
