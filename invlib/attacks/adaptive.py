"""Clients of Adam: a search goes on where the jumps of their updates have stopped it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from invlib.attacks.matching import GradientMatching
from invlib.attacks.parts import Parts
from invlib.attacks.shifts import joined
from invlib.core.observation import Observation
from invlib.core.reconstruction import Reconstruction
from invlib.federated import FedAvg
from invlib.federated.adaptive import without_jumps
from invlib.optim import objectives
from invlib.optim.coordinates import NaturalImages
from invlib.optim.optimizers import LBFGS

SEARCHED = 0.25  # share of the evaluations that the first search takes
_ROUND = 100  # evaluations between two looks at where the client was


def jumps(observation: Observation) -> bool:
    """Say whether a client's update jumps with the signs of its gradients."""
    return isinstance(observation.protocol, FedAvg) and not observation.protocol.linear


def gone_on(
    found: Reconstruction,
    model: nn.Module,
    observation: Observation,
    parts: Parts,
    *,
    search: GradientMatching,
    evaluations: int,
    told: int,
) -> Reconstruction:
    """Go on from what a search found of a client of Adam, by `without_jumps`.

    Each round begins by asking where the client was, as the images so far say. What is returned has the
    lowest score of all rounds and the search.

    Args:
        found: the search's result.
        model: the model that the client received.
        observation: what the server saw, known to fit the model.
        parts: runs the rounds.
        search: whose score counts, and in whose coordinates the rounds search.
        evaluations: of all rounds together.
        told: steps of earlier parts, as a callback counts them.
    """
    assert found.labels is not None
    labels, images, score = found.labels, found.images, search.scorer(model, observation, found.labels)
    rounds = max(1, evaluations // _ROUND)
    each = evaluations // rounds
    follow = GradientMatching(
        optimizer=LBFGS(
            max_iter=each,
            max_eval=each,
            history_size=50,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search="strong_wolfe",
        ),
        steps=1,
        decay=None,
        log_odds=False,
        loss=search.loss,
        coordinates=search.coordinates or NaturalImages(),
        record_every=1,
    )
    for turn in range(rounds):
        sought = without_jumps(model, observation, images, labels)
        begun = replace(follow, objective=objectives.l2, init=images)
        unit = begun.scorer(model, sought, labels)(images)
        if not 0 < unit < math.inf:
            break
        # It is 1 at its start: torch forgets curvature that is small in absolute terms.
        part = parts.run(
            replace(begun, objective=partial(_relative, unit=unit)),
            sought,
            spent=told + turn,
            steps=told + rounds,
            name="Adam without jumps",
        )
        images = part.images
        found = joined(found, replace(part, score=score(images)), told + turn, 2)
        if part.status == "interrupted":
            break
    return replace(found, note=f"{found.note}, then without the jumps of Adam")


def _relative(
    candidate: Sequence[Tensor],
    target: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    *,
    unit: float,
) -> Tensor:
    return objectives.l2(candidate, target, weights) / unit
