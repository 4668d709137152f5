"""The second search of `invlib.best` where defences are known: by their likelihood, from a result on."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from invlib.attacks.base import index_of_best, likelihood_of
from invlib.attacks.matching import GradientMatching
from invlib.attacks.parts import Parts
from invlib.attacks.polish import scaled
from invlib.attacks.shifts import joined, moved
from invlib.attacks.starts import DECAY, STAGE, coordinates, quasi_newton, statistics
from invlib.core.network import in_mode
from invlib.core.observation import Observation
from invlib.core.reconstruction import Reconstruction
from invlib.optim import priors


def likelier(
    matching: GradientMatching,
    naive: Reconstruction,
    model: nn.Module,
    observation: Observation,
    parts: Parts,
    *,
    evaluations: int,
    natural: float,
    tv: float,
    told: int,
) -> Reconstruction:
    """Go on from a result of matching by the likelihood of the defences, and keep what is likelier.

    Args:
        matching: the search as it would be with directions.
        naive: what it gave, as if numbers had been sent as they are.
        model: the model that the client received.
        observation: what the server saw, with labels.
        parts: what runs the search.
        evaluations: how many of them it may use.
        natural: the weight of the natural prior.
        tv: the weight of total variation.
        told: steps of the search that gave ``naive``.
    """
    known = likelihood_of(matching.objective, observation)
    assert naive.labels is not None
    search = replace(
        matching,
        priors=(
            *matching.priors,
            (natural, coordinates(matching).prior(observation.normalization)),
            (tv, priors.rounded_total_variation),
            *statistics(model, observation, natural or DECAY),
        ),
        optimizer=quasi_newton(evaluations // max(1, evaluations // STAGE)),
        steps=max(1, evaluations // STAGE),
        decay=None,
        restarts=1,
        prune=False,
        smoothing=None,
        fading=1.0,
        log_odds=False,
    )
    problem = search.problem(model, observation)
    likelihood = search.scorer(model, observation, naive.labels)

    def cost(images: Tensor) -> float:
        inputs = problem.encode(images.to(problem.like))
        with in_mode(model, training=observation.training_mode, seed=0):
            prior = sum(weight * float(prior(inputs)) for weight, prior in problem.priors)
        return likelihood(images) + prior

    try:
        tried = zip(naive.trials, naive.trial_scores.tolist(), strict=True)
        scores = [likelihood(images) if math.isfinite(score) else math.nan for images, score in tried]
        trial_scores = torch.tensor(scores, dtype=torch.float64, device=naive.trial_scores.device)
        best, unit = index_of_best(trial_scores), known.unit(list(observation.update.values()))
        found = replace(
            naive,
            images=naive.trials[best],
            score=scores[best],
            trial_scores=trial_scores,
            objective=known.words,
            evaluations=naive.evaluations + len(scores),
            history=scaled(naive.history, unit),
            warnings=problem.notes,
            note=f"{naive.note}; then by {known.words}",
        )
        if naive.status in ("interrupted", "non_finite"):
            return found
        told = max([told, *naive.history.steps])
        search, steps = replace(search, init=found.images), told + search.steps
        refined = parts.run(search, observation, spent=told, steps=steps, name="likelihood")
        result = joined(found, replace(refined, score=math.inf), told, 0)
        if cost(refined.images) < cost(found.images):
            return moved(result, refined.images, refined.score)
    except KeyboardInterrupt:
        return replace(naive, status="interrupted")
    return replace(result, note=f"{result.note}, which came to nothing likelier")
