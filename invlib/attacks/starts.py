"""What a search by `invlib.best` starts with: optimiser, coordinates, near-grey images, smoothing, units."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from invlib.attacks.base import known_labels, likelihood_of
from invlib.attacks.matching import GradientMatching, checked_starts
from invlib.autodiff.smoothing import Smoothing, rounded
from invlib.core.network import like
from invlib.core.observation import Observation, undefended
from invlib.errors import RecoveryError
from invlib.federated import observe
from invlib.optim import priors
from invlib.optim.coordinates import NaturalImages
from invlib.optim.optimizers import LBFGS
from invlib.optim.statistics import batch_statistics
from invlib.search.halving import rungs
from invlib.settings import checked

DECAY = 0.03  # factor of both priors' weights at the last step, where the objective can be trusted
STAGE = 50  # evaluations at one sharpness: with fewer, line searches use them up
_SENT = 10.0  # initial weight of the batch statistics that were sent, in the same unit as both priors
_FAINT = 0.1  # standard deviation of the noise around grey, so that images and restarts start apart
_SHARPENINGS = 16  # at most: a factor of two each


def quasi_newton(evaluations: int) -> LBFGS:
    """Return L-BFGS whose step takes so many evaluations at most."""
    # The curvature is kept from one sharpness to the next: it changes little, and learning it anew costs.
    # No tolerance: on a fresh ConvNet8 torch's own would end the search where it begins.
    return LBFGS(
        max_iter=evaluations,
        max_eval=evaluations,
        history_size=50,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search="strong_wolfe",
    )


def coordinates(matching: GradientMatching) -> NaturalImages:
    """Return the coordinates of a search; those of natural images where it names none."""
    return matching.coordinates or NaturalImages()


def faint(matching: GradientMatching, observation: Observation, generator: torch.Generator) -> Tensor:
    """Draw starts near plain grey."""
    generator = checked("generator", generator, torch.Generator)
    noise = torch.randn(checked_starts(matching.restarts, observation), generator=generator)
    return coordinates(matching).images(_FAINT * noise).clamp(0, 1)


def noise_image(
    matching: GradientMatching, model: nn.Module, observation: Observation
) -> tuple[float, Smoothing, int]:
    """Return the objective of a noise image, the smoothing to begin with, and how many evaluations that took.

    Smoothing that changes an update more than another image does would hide the image altogether: a fresh
    network whose activations shrink from layer to layer needs a far sharper softplus than a trained one.
    """
    shape = (observation.num_images, *observation.image_shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    some = like(model)
    images = observation.normalization.decode(noise.to(some)).clamp(0, 1)
    labels = known_labels(model, observation)
    known = likelihood_of(matching.objective, observation)
    if known is None or not known.sigma:
        unit = matching.scorer(model, observation, labels)(images)
    of_noise = observe(
        model,
        images,
        labels,
        undefended(observation.protocol),
        normalization=observation.normalization,
        training_mode=observation.training_mode,
        loss=observation.loss or matching.loss,
    )
    smoothing, asked, score = Smoothing(), 2, matching.scorer(model, of_noise, labels)
    if known is not None and known.sigma:  # the client's noise would count as a distance
        unit = score(images.flip(-1, -2))
    for _ in range(_SHARPENINGS):
        asked += 1
        with rounded(smoothing.start):
            changed = score(images)
        if changed <= unit:
            break
        smoothing = Smoothing(start=2 * smoothing.start, end=2 * smoothing.end)
    return unit, smoothing, asked


def mean_restarts(matching: GradientMatching) -> float:
    """Return how many restarts run on average over the steps."""
    plan = rungs(matching.steps, matching.restarts, matching.prune)
    before = (0, *(rung for rung, _ in plan))
    steps = sum((rung - start) * left for (rung, left), start in zip(plan, before, strict=False))
    return steps / matching.steps


def statistics(
    model: nn.Module, observation: Observation, unit: float
) -> tuple[tuple[float, priors.Unbound], ...]:
    """Return the equations that sent buffers are, with their weight; none where there are none."""
    if not observation.training_mode:
        return ()
    try:
        batch_statistics(model, observation)
    except RecoveryError:
        return ()
    return ((_SENT * unit, priors.BatchStatistics()),)
