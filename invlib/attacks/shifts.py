"""Shifted copies: a search often finds the picture in another place than where it is, and stays there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.matching import GradientMatching
from invlib.autodiff.smoothing import Smoothing
from invlib.core.network import record_layers
from invlib.core.observation import Observation
from invlib.core.reconstruction import Callback, History, Progress, Reconstruction
from invlib.optim.schedules import geometric

Move = tuple[int, int]

_REACH = 2  # strides, up and down and to the sides
# The way from round kinks to sharp ones is 0 to 1: there the search stops, shifted copies are compared, and
# the rest begins.
_FOUND, _SHIFTED, _REST = 0.37, 0.5, 0.6
# Which part of the budget is spent when the search ends, and at most when the last copies were compared.
_SEARCH, _COMPARED = 1 / 6, 5 / 6


def moves(model: nn.Module, observation: Observation) -> list[Move]:
    """Return how far, down and across, the picture may lie beside where it is, in pixels.

    A network that pools over all places at its end does not ask where things are, only how they lie to the
    grid of its strides: what is shifted by their product gives nearly the same gradient, the border apart.
    The product is measured: the side of the image over that of the smallest output of a convolution. None for
    a batch, in which each image would have to be shifted by itself, or where nothing is strided.
    """
    if observation.num_images > 1:
        return []
    zeros = torch.zeros(1, *observation.image_shape).to(next(model.parameters()))
    sides = [call.output.shape[-2:] for call in record_layers(model, zeros, nn.Conv2d)[1]]
    image = observation.image_shape[-2:]
    strides = [side // min(outputs) for side, outputs in zip(image, zip(*sides, strict=True), strict=False)]
    if not sides or strides == [1, 1]:
        return []
    down, across = (
        [n * stride for n in range(-_REACH, _REACH + 1) if abs(n * stride) <= side // 2]
        for stride, side in zip(strides, image, strict=True)
    )
    return [(i, j) for i in down for j in across if (i, j) != (0, 0)]


def shifted(images: Tensor, move: Move) -> Tensor:
    """Return images ``(N, C, H, W)`` shifted down and across by so many pixels; the edges fill the gap."""
    (down, across), (height, width) = move, images.shape[-2:]
    i, j = abs(down), abs(across)
    padded = F.pad(images, (j, j, i, i), mode="replicate")
    return padded[..., i - down : i - down + height, j - across : j - across + width]


def settled(
    search: GradientMatching,
    model: nn.Module,
    observation: Observation,
    *,
    places: list[Move],
    copies: int,
    stage: int,
    asks: int,
    generator: torch.Generator,
    callback: Callback | None,
    progress: bool,
) -> Reconstruction:
    """Search while the kinks are round, shift what was found as long as that helps, and go on from there.

    Args:
        search: the whole search, as it would be without shifting.
        model: the model that the client received.
        observation: what the server saw.
        places: as `moves` gives them.
        copies: how many shifted copies are compared with the picture where it is, at a time.
        stage: steps of the search before copies are compared.
        asks: evaluations in a step.
        generator: draws the starting points.
        callback: as for `invlib.GradientMatching`.
        progress: show progress bars.
    """
    spent = 0.0
    score_of: Callable[[Tensor], float] | None = None

    def run(first: float, last: float, steps: int, **settings: object) -> Reconstruction:
        part = replace(_part(search, first, last), steps=steps, **settings)  # type: ignore[arg-type]
        watch = None if callback is None else _heard(callback, round(spent), search.steps)
        return part(model, observation, generator=generator, callback=watch, progress=progress)

    first = max(2 * stage, round(_SEARCH * search.steps))
    found = run(0, _FOUND, first)
    spent += first
    # The picture where it is and each copy take a stage, the best of them another, and choosing the copies an
    # evaluation for each place.
    price = (copies + 2) * stage + len(places) / asks
    while spent + price <= _COMPARED * search.steps and found.status == "max_steps":
        assert found.labels is not None
        try:
            score_of = score_of or search.scorer(model, observation, found.labels)
            others = [shifted(found.images, place) for place in places]
            scores = [score_of(other) for other in others]
        except KeyboardInterrupt:
            return replace(found, status="interrupted")
        order = sorted(range(len(places)), key=scores.__getitem__)[:copies]
        starts = torch.stack([found.images, *(others[k] for k in order)])
        race = run(_FOUND, _SHIFTED, 2 * stage, init=starts, restarts=len(starts), prune=True)
        moved = race.score < min(found.score, float(race.trial_scores[0]))
        found = _joined(found, race, round(spent), len(places))
        spent += price
        if not moved:
            break
    if found.status != "max_steps":
        return found
    rest = run(_REST, 1, int(search.steps - spent), init=found.images, restarts=1)
    return _joined(found, rest, round(spent), 0)


def _part(search: GradientMatching, first: float, last: float) -> GradientMatching:
    """Return the part of a search from one place on the way from round kinks to sharp ones to another."""
    kinks = search.smoothing
    return replace(
        search,
        smoothing=kinks
        and Smoothing(
            start=geometric(kinks.start, kinks.end, first), end=geometric(kinks.start, kinks.end, last)
        ),
        priors=tuple((geometric(1, search.fading, first) * weight, prior) for weight, prior in search.priors),
        fading=geometric(1, search.fading, last - first),
    )


def _heard(callback: Callback, spent: int, steps: int) -> Callback:
    def hear(progress: Progress) -> bool | None:
        if progress.step == 0 and spent > 0:
            return None  # the start of a part is the end of the one before
        return callback(replace(progress, step=spent + progress.step, steps=steps))

    return hear


def _joined(before: Reconstruction, after: Reconstruction, spent: int, asked: int) -> Reconstruction:
    """Return the restarts of a search, with what came of the best one in its place where that is better."""
    scores, trials = before.trial_scores.clone(), before.trials.clone()
    best = int(torch.where(torch.isfinite(scores), scores, torch.inf).argmin())
    images, score = before.images, before.score
    if after.score < before.score:
        images, score = after.images, after.score
        scores[best], trials[best] = score, images
    return replace(
        before,
        images=images,
        score=score,
        trial_scores=scores,
        trials=trials,
        status=after.status,
        seconds=before.seconds + after.seconds,
        evaluations=before.evaluations + after.evaluations + asked,
        history=_continued(before.history, after.history, spent, best),
    )


def _continued(before: History, after: History, spent: int, best: int) -> History:
    """Return a history that goes on with the lowest cost of each later step, in the column of the best."""

    def column(first: Tensor, then: Tensor) -> Tensor:
        rows = first.new_full((len(then), first.shape[1]), torch.nan)
        rows[:, best] = torch.where(torch.isnan(then), torch.inf, then).amin(1).to(rows)
        return torch.cat([first, rows])

    return History(
        steps=[*before.steps, *(spent + step for step in after.steps)],
        cost=column(before.cost, after.cost),
        objective=column(before.objective, after.objective),
    )
