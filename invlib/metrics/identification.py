"""What a reconstruction is worth beside what no attack would give, and whether it tells its original."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.core.network import classifier, record_layers
from invlib.core.normalization import Normalization
from invlib.metrics import quality

_SSIM_SIDE = 11


def floors(image: Tensor, others: Tensor, same_class: Tensor) -> dict[str, float | None]:
    """Return the PSNR of what needs no update at all.

    Args:
        image: the private image ``(C, H, W)`` in [0, 1].
        others: images ``(M, C, H, W)`` of the same data set, without it.
        same_class: those of them that are of its class.

    Returns:
        In dB: ``grey``, the best of all plain grey images; ``mean``, the mean of the others; ``class``, the
        mean over the others of its class. None where there are none.
    """
    found: dict[str, float | None] = {"grey": _psnr(image.mean().expand_as(image), image)}
    found["mean"] = _psnr(others.mean(0), image) if len(others) else None
    each = [_psnr(other, image) for other in same_class]
    found["class"] = sum(each) / len(each) if each else None
    return found


def rank(scores: Tensor, own: int) -> int:
    """Return the place of one's own score among all, 1 for the highest; equals count as better.

    >>> rank(torch.tensor([0.2, 0.9, 0.5]), own=2)
    2

    Args:
        scores: one for each candidate; a NaN is lower than all.
        own: which one is one's own.
    """
    if math.isnan(float(scores[own])):
        return len(scores)
    return int((scores >= scores[own]).sum())


def similarity(image: Tensor, candidates: Tensor) -> Tensor | None:
    """Return the SSIM of an image with each candidate, None where they are under 11 pixels a side."""
    if min(image.shape[1:]) < _SSIM_SIDE:
        return None
    return quality.ssim(image.expand_as(candidates).contiguous(), candidates)


class Features:
    """A trained network that looks at images: what its last fully connected layer is given.

    Args:
        model: a network with a fully connected layer.
        normalization: what its input is encoded with.
        side: height and width that it was trained on, in pixels.
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
        found = self(torch.cat([image[None], candidates]))
        return F.cosine_similarity(found[:1], found[1:])


def _psnr(image: Tensor, truth: Tensor) -> float:
    return float(quality.psnr(image[None], truth[None]))
