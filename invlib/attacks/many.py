"""Many observations of one model, attacked in one run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from invlib.attacks.base import compared_by
from invlib.attacks.matching import GradientMatching, hooks_of, reconstruction
from invlib.core.network import in_mode
from invlib.core.observation import Observation, stackable
from invlib.core.reconstruction import Reconstruction
from invlib.errors import ConfigError
from invlib.optim.priors import Unbound
from invlib.search.problem import Joined, Problem
from invlib.search.run import run


def attack_many(
    attack: GradientMatching,
    model: nn.Module,
    observations: Sequence[Observation],
    *,
    generators: Sequence[torch.Generator] | None = None,
    progress: bool = False,
) -> list[Reconstruction]:
    """Attack many observations of one model in one run, each as if it were alone.

    Small networks leave most of a machine idle; a hundred clients fill it as a hundred restarts do. Restarts
    are pruned among those of their own observation. An attack that stops early (``tolerance``, ``patience``)
    or has priors of its own for each observation, an optimiser that takes one restart at a time, a client
    that cannot be stacked and saturated losses run one observation after another. Ctrl-C ends the run for
    all of them.

    Args:
        attack: what is run.
        model: the model that every client received; it is not changed.
        observations: what the server saw, of clients with the same protocol and shapes.
        generators: draw the starting points, one for each observation; None makes them with seed 0.
        progress: show a progress bar.

    Returns:
        One reconstruction for each observation; its ``seconds`` are an equal share of the whole.

    Raises:
        ObservationError: an observation does not fit the model.
        ConfigError: there is none, they differ in more than updates and labels, or the attack begins at
            given images or matches the largest layers.

    Example:
        >>> import invlib as iv
        >>> model = iv.models.build("LeNetZhu", num_classes=10, seed=0)
        >>> images, labels = iv.data.samples("photos32", indices=[0, 1])
        >>> seen = [
        ...     iv.observe(model, images[k:k+1], labels[k:k+1], iv.FedSGD(), normalization=iv.CIFAR10)
        ...     for k in range(2)
        ... ]
        >>> len(iv.attack_many(iv.inverting_gradients(steps=2), model, seen))
        2
    """
    began = time.perf_counter()
    _check_alike(attack, observations)
    chosen = generators or [torch.Generator().manual_seed(0) for _ in observations]
    if len(chosen) != len(observations):
        raise ConfigError(
            f"generators has {len(chosen)} entries; expected one for each of {len(observations)} observations"
        )
    pairs = list(zip(observations, chosen, strict=True))
    early = (attack.tolerance, attack.patience) != (None, None)
    own_priors = any(isinstance(prior, Unbound) for _, prior in attack.priors)
    parts = list[Problem]()
    if not (early or own_priors) and attack.optimizer.together and stackable(observations[0].protocol):
        for observation in observations:
            model = observation.validate(model)
        parts = [attack.problem(model, o) for o in observations]
    if len({part.alpha for part in parts}) != 1:  # none, or each client rounded its own label's probability
        return [attack(model, o, generator=g, progress=progress) for o, g in pairs]
    starts = [attack.starts(p, o, g) for p, (o, g) in zip(parts, pairs, strict=True)]
    common = {f.name: getattr(parts[0], f.name) for f in fields(Problem)}
    joined = Joined(**common, parts=tuple(parts), guesses=attack.restarts)
    with in_mode(model, training=observations[0].training_mode):
        together = [torch.cat(some) for some in zip(*starts, strict=True)]
        results = run(joined, together, attack.search, hooks_of(None, progress))
        done = [
            reconstruction(*each, compared_by(attack.objective, each[2]), began)
            for each in zip(parts, results, observations, strict=True)
        ]
    share = (time.perf_counter() - began) / len(done)
    return [replace(one, seconds=share) for one in done]


def _check_alike(attack: GradientMatching, observations: Sequence[Observation]) -> None:
    if not observations:
        raise ConfigError("observations is empty; expected at least one")
    if isinstance(attack.init, Tensor):
        raise ConfigError("GradientMatching init is a tensor; expected a name for many observations")
    if attack.layers.which == "largest":
        raise ConfigError(
            "GradientMatching layers are the largest, which differ from one update to the next; expected "
            "others for many observations"
        )
    for name in ("protocol", "num_images", "image_shape", "normalization", "training_mode"):
        first = getattr(observations[0], name)
        for k, observation in enumerate(observations):
            value = getattr(observation, name)
            if value != first:
                raise ConfigError(f"observation {k} has {name} {value}; expected {first}, as the first has")
