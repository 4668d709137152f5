"""The attack to audit with: whichever of this project's is strongest on what the server saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from invlib import objectives, priors
from invlib.matching import GradientMatching, preset
from invlib.observation import Observation
from invlib.optimizers import LBFGS
from invlib.reconstruction import Callback, Reconstruction
from invlib.recursive import is_chain, recursive_inversion
from invlib.smoothing import Smoothing

# Distances of directions: at the first there is nothing left to polish, beyond the second the closed form
# failed (noise was added, say, or equations are missing) and a start from noise is better.
_EXACT, _USABLE = 1e-6, 0.1
_ITERATIONS = 20  # of L-BFGS in a step of the polish


def best(
    *, steps: int = 2400, restarts: int = 1, tv: float = 0.2, **settings: object
) -> Callable[..., Reconstruction]:
    """Return the strongest attack that this project has, chosen by what the server saw.

    A single image behind a chain of layers that can be undone, such as LeNetZhu, is computed in closed form
    by `invlib.recursive_inversion`, and polished by L-BFGS on the squared distance where rounding left an
    error. Everything else is matched by direction with signed Adam, as in `invlib.inverting_gradients`, but
    on a network whose kinks are round at first (`invlib.smoothing.Smoothing`) and with a
    stronger total variation. The reconstruction's ``note`` says which of the two it was.

    Args:
        steps: how many steps at most; each is one evaluation for each restart.
        restarts: how many starting points.
        tv: the weight of total variation.
        settings: any other setting of `invlib.GradientMatching`, for the matching.

    Returns:
        An attack ``(model, observation, *, generator=None, callback=None, progress=False)``. It raises
        what `invlib.GradientMatching` raises.

    Raises:
        ConfigError: a setting is unknown or out of range.

    Source: this project's; its parts are Geiping et al. 2020, arXiv 2003.14053, and Zhu and Blaschko 2021,
    arXiv 2010.07733.

    Taught in: chapter 3
    """
    smooth: dict[str, object] = {"smoothing": Smoothing(), **settings}
    matching = preset(
        GradientMatching(
            steps=steps, restarts=restarts, priors=((tv, priors.total_variation),) if tv else ()
        ),
        smooth,
    )

    def attack(
        model: nn.Module,
        observation: Observation,
        *,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Reconstruction:
        observation.validate(model)
        if is_chain(model, observation):
            found = recursive_inversion()(model, observation)
            if found.score <= _EXACT:
                return found
            if found.score <= _USABLE:
                return _polished(found, model, observation, matching)
        found = matching(model, observation, generator=generator, callback=callback, progress=progress)
        return replace(found, note="gradient matching on a network whose kinks are rounded on the way")

    return attack


def _polished(
    found: Reconstruction, model: nn.Module, observation: Observation, matching: GradientMatching
) -> Reconstruction:
    """Go on from a closed form that rounding or missing equations left inexact."""
    polish = GradientMatching(
        objective=objectives.l2,
        optimizer=LBFGS(max_iter=_ITERATIONS, line_search="strong_wolfe"),
        decay=None,
        init=found.images,
        steps=max(1, matching.steps // _ITERATIONS),
        loss=matching.loss,
    )
    better = polish(model, observation)
    assert found.labels is not None  # the closed form always gives them
    score = matching.score(model, observation, better.images, found.labels)
    if not score < found.score:
        return found
    return replace(
        better,
        score=score,
        trial_scores=torch.tensor([score]),
        seconds=found.seconds + better.seconds,
        evaluations=found.evaluations + better.evaluations,
        note="closed form, layer by layer, polished by L-BFGS",
    )
