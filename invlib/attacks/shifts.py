"""Shifted copies: a search often ends with the picture in another place than where it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.base import index_of_best
from invlib.attacks.matching import GradientMatching
from invlib.attacks.parts import Parts
from invlib.autodiff.smoothing import Smoothing
from invlib.core.calls import trace
from invlib.core.observation import Observation
from invlib.core.reconstruction import History, Reconstruction
from invlib.optim.schedules import geometric
from invlib.settings import Checked, Count

Move = tuple[int, int]

_REACH = 2  # strides, up and down and to the sides
# From the initial sharpness (0) to the last (1), in its logarithm: where the search stops, to where shifted
# copies are compared, and where the rest begins.
FOUND, SHIFTED, REST = 0.37, 0.5, 0.6
# Which part of the budget is spent when the search ends, and at most when the last copies were compared.
_SEARCH, _COMPARED = 1 / 6, 5 / 6


def moves(model: nn.Module, observation: Observation) -> list[Move]:
    """Return how far, down and across, the picture may lie beside where it is, in pixels.

    A network that pools over all places at its end is invariant to shifts by the product of its strides, the
    border apart: they give nearly the same gradient. The product is measured: the side of the image over that
    of the smallest output of a convolution. None where nothing is strided.
    """
    calls = trace(model, torch.zeros(1, *observation.image_shape)).calls
    sides = [c.output.shape[-2:] for c in calls if c.op == "convolution" and c.output.ndim == 4]
    image = observation.image_shape[-2:]
    strides = [side // min(out) for side, out in zip(image, zip(*sides, strict=True), strict=False)]
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


@dataclass(frozen=True, kw_only=True)
class Shifting(Checked):
    """A search that goes on from shifted copies of its result, as long as that lowers the score.

    Args:
        search: the whole search, as it would be without shifting.
        places: as `moves` gives them.
        copies: how many shifted copies are compared with the picture where it is, at a time.
        stage: steps of the search before copies are compared.
        per_step: evaluations in a step.
    """

    search: GradientMatching
    places: tuple[Move, ...]
    copies: Count
    stage: Count
    per_step: Count

    def run(self, model: nn.Module, observation: Observation, parts: Parts) -> Reconstruction:
        """Attack an observation; errors as for `invlib.GradientMatching`."""
        search, stage, spent = self.search, self.stage, 0.0

        def run(first: float, last: float, steps: int, name: str, **settings: object) -> Reconstruction:
            part = replace(part_of(search, first, last), steps=steps, **settings)  # type: ignore[arg-type]
            return parts.run(part, observation, spent=round(spent), steps=search.steps, name=name)

        first, result = max(2 * stage, round(_SEARCH * search.steps)), None
        # The picture where it is and each copy take a stage, the best of them another, and choosing the
        # copies an evaluation for each place.
        price = (self.copies + 2) * stage + len(self.places) / self.per_step
        try:
            result = run(0, FOUND, first, "gradient matching")
            spent += first
            assert result.labels is not None
            score_of = search.scorer(model, observation, result.labels)
            while spent + price <= _COMPARED * search.steps and result.status == "max_steps":
                others = [shifted(result.images, place) for place in self.places]
                scores = [score_of(other) for other in others]
                order = sorted(range(len(others)), key=scores.__getitem__)[: self.copies]
                starts = torch.stack([result.images, *(others[k] for k in order)])
                compared = run(
                    *(FOUND, SHIFTED, 2 * stage, "shifted copies"),
                    init=starts,
                    restarts=len(starts),
                    prune=True,
                )
                moved = compared.score < min(result.score, float(compared.trial_scores[0]))
                result = joined(result, compared, round(spent), len(others))
                spent += price
                if not moved:
                    break
            if result.status == "max_steps":
                left = int(search.steps - spent)
                rest = run(REST, 1, left, "gradient matching", init=result.images, restarts=1)
                result = joined(result, rest, round(spent), 0)
        except KeyboardInterrupt:
            if result is None:
                raise
            result = replace(result, status="interrupted")
        return result


def part_of(search: GradientMatching, first: float, last: float) -> GradientMatching:
    """Return the part of a search between two places from 0, the initial sharpness, to 1, the last."""
    whole = search.smoothing
    return replace(
        search,
        smoothing=whole
        and Smoothing(
            start=geometric(whole.start, whole.end, first), end=geometric(whole.start, whole.end, last)
        ),
        priors=tuple((geometric(1, search.fading, first) * weight, prior) for weight, prior in search.priors),
        fading=geometric(1, search.fading, last - first),
    )


def moved(before: Reconstruction, images: Tensor, score: float) -> Reconstruction:
    """Return a result whose best restart has gone to other images."""
    scores, trials = before.trial_scores.clone(), before.trials.clone()
    best = index_of_best(scores)
    scores[best], trials[best] = score, images
    return replace(before, images=images, score=score, trial_scores=scores, trials=trials)


def joined(before: Reconstruction, after: Reconstruction, spent: int, asked: int) -> Reconstruction:
    """Return the restarts of a search, with a later part's result for the best where it is better."""
    best = index_of_best(before.trial_scores)
    if after.score < before.score:
        before = moved(before, after.images, after.score)
    return replace(
        before,
        status=after.status,
        seconds=before.seconds + after.seconds,
        evaluations=before.evaluations + after.evaluations + asked,
        history=_continued(before.history, after.history, spent, best),
    )


def _continued(before: History, after: History, spent: int, best: int) -> History:
    """Return a history that goes on with the lowest cost of each later step, in the column of the best."""
    if not before.steps:
        return after

    def column(first: Tensor, then: Tensor) -> Tensor:
        rows = first.new_full((len(then), first.shape[1]), torch.nan)
        rows[:, best] = torch.where(torch.isnan(then), torch.inf, then).amin(1).to(rows)
        return torch.cat([first, rows])

    return History(
        steps=[*before.steps, *(spent + step for step in after.steps)],
        cost=column(before.cost, after.cost),
        objective=column(before.objective, after.objective),
    )
