"""The polish of a result: L-BFGS on the squared distance, until none of its rounds helps."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from invlib.attacks.base import index_of_best
from invlib.attacks.matching import GradientMatching
from invlib.attacks.parts import Parts
from invlib.attacks.shifts import joined
from invlib.attacks.starts import coordinates, quasi_newton
from invlib.attacks.verified import distance_of
from invlib.core.observation import Observation
from invlib.core.reconstruction import History, Reconstruction
from invlib.optim import objectives
from invlib.optim.objectives import Objective

_GAIN = 0.99  # a round of the polish that leaves more than this of the distance was the last
_BLURRED = 1e-5  # a cosine below is mostly rounding in single precision
_POLISH = 20  # iterations of the polish between two projections to the box


def polished(
    matching: GradientMatching,
    start: Reconstruction,
    model: nn.Module,
    observation: Observation,
    spare: int,
    parts: Parts,
    told: int = 0,
) -> Reconstruction:
    """Lower the squared distance from a result on, until so many evaluations are spent or none helps.

    Each round begins with no memory of curvature, for a line search that failed would fail again. Its
    cost is 1 at its start: torch forgets curvature that is small in absolute terms.
    """
    assert start.labels is not None
    labels, closed = start.labels, start.status == "closed_form"
    distance = distance_of(model, observation, matching.loss)
    length = float(sum(part.double().square().sum() for part in observation.update.values()))
    # Of log-odds, which stand for a loss that is saturated, the length means nothing.
    turned = matching.problem(model, observation, labels).alpha is not None
    result, status = start, start.status
    try:
        if not closed:
            start = result = _remeasured(matching, start, model, observation)
        nearest, spent = distance(start.images, labels), 1
        while (steps := round((spare - spent) / _POLISH)) >= 1 and nearest > 0:
            polish = GradientMatching(
                objective=_relative(objectives.chordal, nearest)
                if turned
                else _relative(objectives.l2, 2 * nearest * length),
                optimizer=quasi_newton(min(_POLISH, spare)),
                decay=None,
                init=result.images,
                steps=steps,
                loss=matching.loss,
                log_odds=matching.log_odds,
                coordinates=coordinates(matching),
                recompute=matching.recompute,
                record_every=1,
            )
            part = parts.run(
                polish,
                replace(observation, labels=labels),
                spent=told,
                steps=told + steps,
                name="squared distance",
            )
            score = distance(part.images, labels)
            spent, told = spent + part.evaluations + 1, told + steps
            if not result.engine:
                result = replace(result, engine=part.engine, engine_reason=part.engine_reason)
            result = joined(result, _scored(part, score, nearest), told - steps, 1)
            status = part.status
            if status == "max_steps" and not score < _GAIN * nearest and spare - spent >= _POLISH:
                status = "converged"
            if status != "max_steps":
                break
            nearest = min(nearest, score)
    except KeyboardInterrupt:
        status = "interrupted"
    gained = result.images is not start.images
    if closed and not gained and status != "interrupted":
        status = "closed_form"
    how = ", polished by L-BFGS" if closed else ", then by squared distance"
    how = how if gained and not start.note.endswith(how) else ""
    return replace(result, status=status, note=start.note + how)


def _remeasured(
    matching: GradientMatching, found: Reconstruction, model: nn.Module, observation: Observation
) -> Reconstruction:
    """Measure those restarts anew that single precision cannot tell apart, and choose among all again."""
    assert found.labels is not None
    distance, labels = distance_of(model, observation, matching.loss), found.labels
    scores = [
        distance(images, labels) if score < _BLURRED else score
        for score, images in zip(found.trial_scores.tolist(), found.trials, strict=True)
    ]
    trial_scores = torch.tensor(scores, dtype=torch.float64, device=found.trial_scores.device)
    best = index_of_best(trial_scores)
    return replace(found, images=found.trials[best], score=scores[best], trial_scores=trial_scores)


def _relative(objective: Objective, scale: float) -> Objective:
    """Return an objective over a number."""
    return lambda candidate, target, weights=None: objective(candidate, target, weights) / scale


def _scored(part: Reconstruction, score: float, unit: float) -> Reconstruction:
    """Return a round of the polish, measured as a search is; infinite where nothing was gained."""
    return replace(part, score=score if score < unit else math.inf, history=scaled(part.history, unit))


def scaled(history: History, unit: float) -> History:
    """Return what was recorded in another unit."""
    return replace(history, cost=unit * history.cost, objective=unit * history.objective)
