"""Floors that need no attack, and whether a reconstruction identifies its original among other images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.core.network import classifier, record_layers
from invlib.core.normalization import Normalization
from invlib.errors import ConfigError
from invlib.metrics import quality

Likeness = Callable[[Tensor, Tensor], Tensor]

_Z = 1.96  # standard deviations of a normal distribution within which 95 % lie


def floors(image: Tensor, others: Tensor, same_class: Tensor) -> dict[str, float | None]:
    """Return the PSNR in dB of guesses that need no update.

    Args:
        image: the private image ``(C, H, W)`` in [0, 1].
        others: images ``(M, C, H, W)`` of the same data set, without it.
        same_class: those of them that are of its class.

    Returns:
        ``grey``, the best of all plain grey images; ``mean``, the mean of the others; ``class``, the
        mean over the others of its class. None where there are none.
    """
    each = [_psnr(other, image) for other in same_class]
    return {
        "grey": _psnr(image.mean().expand_as(image), image),
        "mean": _psnr(others.mean(0), image) if len(others) else None,
        "class": sum(each) / len(each) if each else None,
    }


def rank(scores: Tensor, own: int) -> int:
    """Return the place of one score among all, 1 for the highest; equal scores count as better.

    >>> rank(torch.tensor([0.2, 0.9, 0.5]), own=2)
    2

    Args:
        scores: one for each candidate; a NaN is lower than all.
        own: the index of the score that is placed.
    """
    if math.isnan(float(scores[own])):
        return len(scores)
    return int((scores >= scores[own]).sum())


@dataclass(frozen=True, kw_only=True)
class Identified:
    """Whether reconstructions pick their originals out of a pool of images, beside what a guess would.

    Args:
        ranks: of each reconstruction, the place of its original among all candidates; 1 is the most alike.
        candidates: how many images there were to choose from.
    """

    ranks: tuple[int, ...]
    candidates: int

    @property
    def hits(self) -> int:
        """How many reconstructions are more like their original than like any other candidate."""
        return self.ranks.count(1)

    @property
    def share(self) -> float:
        """The share of them, which papers call image identifiability precision."""
        return self.hits / len(self.ranks)

    @property
    def chance(self) -> float:
        """The share that guessing would give."""
        return 1 / self.candidates

    @property
    def interval(self) -> tuple[float, float]:
        """The limits between which the share of all such images lies, with 95 % confidence (Wilson 1927)."""
        n, p, z = len(self.ranks), self.share, _Z**2 / len(self.ranks)
        middle, half = p + z / 2, _Z * math.sqrt(p * (1 - p) / n + z / (4 * n))
        return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"identified {self.hits} of {len(self.ranks)} among {self.candidates} candidates: "
            f"{self.share:.0%} (95 %: {low:.0%} to {high:.0%}), chance {self.chance:.1%}"
        )


def by_pixels(image: Tensor, candidates: Tensor) -> Tensor:
    """Return the negative mean squared difference of an image ``(C, H, W)`` and each candidate."""
    return -quality.mse(image.expand_as(candidates), candidates)


def by_ssim(image: Tensor, candidates: Tensor) -> Tensor:
    """Return the SSIM of an image ``(C, H, W)`` with each candidate; errors as for `ssim`."""
    return quality.ssim(image.expand_as(candidates).contiguous(), candidates)


def by_lpips(image: Tensor, candidates: Tensor) -> Tensor:
    """Return the negative perceptual distance of an image ``(C, H, W)`` and each candidate; see `lpips`."""
    return -quality.lpips(image.expand_as(candidates), candidates)


def identifiability(
    images: Tensor, truth: Tensor, pool: Tensor, *, likeness: Likeness = by_pixels
) -> Identified:
    """Say which reconstructions are more like their own original than like any other image of a pool.

    A PSNR says how near an image is; this says whether it gives away *which* image it was. Candidates are the
    pool and the originals that it lacks. A candidate that is equally alike counts against the original.

    Args:
        images: reconstructions ``(N, C, H, W)`` in [0, 1], in the truth's order, such as `Report.images`; of
            several clients, concatenated.
        truth: their originals, of the same shape.
        pool: images ``(M, C, H, W)`` that might have been the private ones, with the originals or without;
            of the same classes where the server knows the labels, or a label alone tells them apart.
        likeness: ``(image, candidates) -> (M,)``, higher is more alike: `by_pixels`, `by_ssim`, `by_lpips`,
            or ``Features(...).similarity`` of a trained network.

    Raises:
        ConfigError: the shapes do not fit, there is no image, or only one candidate, or truth or pool do not
            lie in [0, 1].

    Example:
        >>> pool = torch.eye(4).reshape(4, 1, 2, 2)
        >>> print(identifiability(pool[:2] * 0.3, pool[:2], pool))
        identified 2 of 2 among 4 candidates: 100% (95 %: 34% to 100%), chance 25.0%

    Source: Yin et al. 2021, arXiv 2104.07586, "image identifiability precision".
    """
    images, truth = (part.float() for part in quality.pair(images, truth))
    pool = quality.originals(pool, "the pool").to(truth)
    if pool.shape[1:] != truth.shape[1:]:
        raise ConfigError(
            f"the truth has shape {tuple(truth.shape)} and the pool {tuple(pool.shape)}; expected "
            "(N, C, H, W) and (M, C, H, W)"
        )
    candidates, own = pool, []
    for original in truth:
        same = (candidates == original).flatten(1).all(1).nonzero()
        own.append(int(same[0]) if len(same) else len(candidates))
        candidates = candidates if len(same) else torch.cat([candidates, original[None]])
    if len(candidates) < 2:
        raise ConfigError("the pool has no image besides the truth; expected at least one")
    places = [rank(likeness(image, candidates), k) for image, k in zip(images, own, strict=True)]
    return Identified(ranks=tuple(places), candidates=len(candidates))


class Features:
    """The input of a trained network's last fully connected layer, as a description of images.

    Args:
        model: a network with a fully connected layer.
        normalization: what its input is encoded with.
        side: height and width in pixels that it was trained on.
        name: which network it is.
    """

    def __init__(self, model: nn.Module, normalization: Normalization, side: int, name: str) -> None:
        self.model, self.normalization, self.side, self.name = model, normalization, side, name

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features ``(N, D)`` of images ``(N, C, H, W)`` in [0, 1]."""
        if images.shape[-1] != self.side or images.shape[-2] != self.side:
            images = F.interpolate(
                images, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False
            )
        name = classifier(self.model)[0].removesuffix("weight").removesuffix(".")
        _, calls = record_layers(self.model, self.normalization.encode(images), nn.Linear)
        features: Tensor = next(call.given for call in calls if call.name == name)
        return features.flatten(1)

    def similarity(self, image: Tensor, candidates: Tensor) -> Tensor:
        """Return the cosine of the angle between the features of an image and of each candidate."""
        features = self(torch.cat([image[None], candidates]))
        return F.cosine_similarity(features[:1], features[1:])


def _psnr(image: Tensor, truth: Tensor) -> float:
    return float(quality.psnr(image[None], truth[None]))
