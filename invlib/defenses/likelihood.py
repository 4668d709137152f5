"""How what is known of a client's transforms becomes one objective: a negative log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invlib.defenses.transforms import Box, Named, Transform
from invlib.optim import objectives

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Likelihood:
    r"""An objective: how unlikely an update is to be seen where a guess gives another one.

    With noise of standard deviation :math:`\sigma` it is the negative logarithm of a probability, up to a
    constant: :math:`\|s - u\|^2 / 2 \sigma^2` (Gaussian) or :math:`\sqrt 2\, \|s - u\|_1 / \sigma` (Laplace);
    a number that was rounded or left out after the noise counts by the probability of its interval. Without
    noise only directions are compared, as in `invlib.optim.objectives.cosine`; a number that was rounded or
    left out counts by its distance from its interval.

    Args:
        transforms: of the client, in their order.

    Source: Balunović et al. 2022 (Bayesian framework for gradient leakage), arXiv 2111.04706.
    """

    transforms: tuple[Transform, ...]

    @property
    def _noisy(self) -> int:
        """How many transforms there are up to the last that draws noise."""
        return max((k for k, t in enumerate(self.transforms, 1) if t.noise), default=0)

    @property
    def sigma(self) -> float:
        """The standard deviation of the noise in each number; 0 where only a direction is compared."""
        if any(t.rescales for t in self._after_noise):
            return 0.0
        return math.hypot(*(t.noise for t in self.transforms))

    @property
    def _after_noise(self) -> tuple[Transform, ...]:
        noisy = [k for k, t in enumerate(self.transforms) if t.noise]
        return self.transforms[noisy[0] :] if noisy else ()

    @property
    def _coarse(self) -> tuple[Transform, ...]:
        """The transforms after all noise by which numbers stand for intervals."""
        return tuple(t for t in self.transforms[self._noisy :] if t.coarse)

    @property
    def words(self) -> str:
        """What it is, such as ``the likelihood of clip 1, noise 0.01``."""
        return f"the likelihood of {', '.join(t.words for t in self.transforms) or 'no defence'}"

    @property
    def doubts(self) -> tuple[str, ...]:
        """What it leaves out, a sentence each."""
        noisy = [t for t in self.transforms if t.noise]
        doubts = []
        if any(t.rescales for t in self._after_noise):
            doubts.append("a clip after noise: only the direction of the update is compared")
        if len(noisy) > 1 and any(t.law != "gaussian" for t in noisy):
            doubts.append("sums of Laplace noise are taken as Gaussian, with the variances added")
        elif self._coarse and any(t.law != "gaussian" for t in noisy):
            doubts.append("Laplace noise before rounding is taken as Gaussian")
        for t in self.transforms[: self._noisy]:
            if t.coarse and type(t).simulate is Transform.simulate:
                doubts.append(f"{t.words} before noise is left out of the likelihood")
        return tuple(doubts)

    @property
    def directional(self) -> bool:
        """Whether nothing but a direction is compared, number by number."""
        return not self.sigma and not self._coarse

    def unit(self, target: Tensors) -> float:
        r"""Return what it makes of a cosine distance of 1, about: the signal-to-noise ratio of an update.

        That is :math:`\|s\|^2 / \sigma^2 - p` of :math:`p` numbers, from one standard deviation of it up; 1
        without noise.

        Args:
            target: the update that was seen.
        """
        if not (sigma := self.sigma):
            return 1.0
        count = sum(int(t.count_nonzero()) for t in target)
        square = sum(float(t.double().square().sum()) for t in target) / sigma**2
        return max(square - count, math.sqrt(2 * count), 1.0)

    def simulate(self, update: Named) -> dict[str, Tensor]:
        """Return what the transforms make of one update, without noise and what is rounded after it.

        Args:
            update: of the client without them.
        """
        now = dict(update)
        for k, transform in enumerate(self.transforms):
            if not transform.coarse or k < self._noisy:
                now = transform.simulate(now)
        return now

    def __call__(self, candidate: Tensors, target: Tensors, weights: Sequence[float] | None = None) -> Tensor:
        """Return the objective of two updates, lists of tensors as `cosine` takes them."""
        factors = [1.0] * len(target) if weights is None else list(weights)
        sigma, coarse = self.sigma, self._coarse
        box: Box = [(t, t) for t in target]
        for transform in reversed(coarse):
            box = transform.before(box)
        if not sigma:
            return (
                _to_intervals(candidate, box, factors)
                if coarse
                else objectives.cosine(candidate, target, weights)
            )
        noise = [t for t in self.transforms if t.noise]
        if not coarse and len(noise) == 1 and noise[0].law == "laplace":
            return math.sqrt(2) / sigma * objectives.l1(candidate, target, weights)
        if not coarse:
            return objectives.l2(candidate, target, weights) / (2 * sigma**2)
        parts = [
            w * _unlikely(c, *ends, sigma).sum() for c, ends, w in zip(candidate, box, factors, strict=True)
        ]
        return torch.stack(parts).sum()


def _to_intervals(candidate: Tensors, box: Box, factors: list[float]) -> Tensor:
    r"""Return half the squared distance of a direction from intervals, over the length of what is known.

    .. math:: \frac{\sum_j (a c_j - [a c_j])^2}{2 \|s\|^2}, \quad a = \|s\| / \|c\|

    with the nearest number :math:`[\cdot]` of each interval, and lengths of those numbers whose interval does
    not hold zero. With points for intervals it is the cosine distance.
    """
    length = of = everything = candidate[0].new_zeros(())
    for c, (low, high), w in zip(candidate, box, factors, strict=True):
        known = low.isfinite() & high.isfinite() & ~((low < 0) & (high > 0))
        length = length + w * torch.where(known, (low + high) / 2, 0).square().sum()
        of = of + w * torch.where(known, c, 0).square().sum()
        everything = everything + w * c.square().sum()
    nothing = length == 0  # of signs no length is known
    length, of = torch.where(nothing, 1.0, length), torch.where(nothing, everything, of)
    scale = (length / of.clamp_min(torch.finfo(of.dtype).tiny)).sqrt()
    far = [
        w * (scale * c - torch.clamp(scale * c, low, high)).square().sum()
        for c, (low, high), w in zip(candidate, box, factors, strict=True)
    ]
    return torch.stack(far).sum() / (2 * length)


def _unlikely(mean: Tensor, low: Tensor, high: Tensor, sigma: float) -> Tensor:
    """Return the negative log-probability of intervals under Gaussians, and of points the log-density."""
    point = low == high
    value = torch.where(point, low, 0)
    of_point = ((value - mean) / sigma).square() / 2
    below, above = (torch.where(point, end, x) for end, x in ((-1.0, low), (1.0, high)))
    far = 1e4  # standard deviations: beyond, an end counts as infinite
    start, end = (((x - mean) / sigma).clamp(-far, far) for x in (below, above))
    # Both ends are taken to the lower tail, where differences of probabilities keep their digits.
    flip = start + end > 0
    start, end = torch.where(flip, -end, start), torch.where(flip, -start, end)
    most = torch.special.log_ndtr(end)
    gap = (torch.special.log_ndtr(start) - most).clamp(max=-torch.finfo(mean.dtype).eps)
    return torch.where(point, of_point, -most - torch.log(-torch.expm1(gap)))
