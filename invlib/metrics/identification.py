"""Floors that need no attack, and whether a reconstruction identifies its original among other images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.core.network import classifier, record_layers
from invlib.core.normalization import Normalization
from invlib.metrics import quality


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


def similarity(image: Tensor, candidates: Tensor) -> Tensor | None:
    """Return the SSIM of an image with each candidate, None where they are under 11 pixels a side."""
    if min(image.shape[1:]) < quality.SSIM_SIDE:
        return None
    return quality.ssim(image.expand_as(candidates).contiguous(), candidates)


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
