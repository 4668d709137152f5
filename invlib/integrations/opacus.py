"""What Opacus's optimiser says about the privacy of a training: clip, noise, batch and sampling rate."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from invlib.errors import ConfigError, DoubtWarning
from invlib.settings import Checked, Count, NotNegative, Positive


@dataclass(frozen=True, kw_only=True)
class Privacy(Checked):
    """Clipped and noised gradients, as a bound on what they give away asks for them.

    Args:
        clip_norm: the longest gradient of one image.
        noise_multiplier: standard deviation of the noise on the sum of the clipped gradients, over the clip.
        batch_size: the expected number of images in a step.
        noise: standard deviation of the noise on each number of the gradient that the optimiser steps with.
        rate: the probability with which an image takes part in a step; 1 where no sampling is known.
        steps: of the optimiser; None where nothing says it.
    """

    clip_norm: Positive
    noise_multiplier: NotNegative
    batch_size: Count
    noise: NotNegative
    rate: Positive = 1.0
    steps: Count | None = None


def privacy_of(optimizer: Any, loader: Any = None, *, steps: int | None = None) -> Privacy:
    """Read clip, noise and batch size off Opacus's optimiser, and the rate off its loader.

    Args:
        optimizer: an `opacus.optimizers.DPOptimizer`, as `PrivacyEngine.make_private` gives it.
        loader: the data loader that it gives beside it. Only one that draws each image by itself, with a
            probability, has a rate below 1; for others, and without a loader, the rate is 1.
        steps: how many steps are taken, where it is known.

    Raises:
        ConfigError: the optimiser is none of Opacus's, or its numbers are out of range.

    Source: Abadi et al. 2016, arXiv 1607.00133.
    """
    wanted = ("max_grad_norm", "noise_multiplier", "expected_batch_size", "loss_reduction")
    if lacking := [name for name in wanted if not hasattr(optimizer, name)]:
        raise ConfigError(
            f"optimizer is a {type(optimizer).__name__} without {lacking[0]}; expected the optimizer that "
            "Opacus's PrivacyEngine.make_private gives"
        )
    clip, multiplier = float(optimizer.max_grad_norm), float(optimizer.noise_multiplier)
    if optimizer.expected_batch_size is None and loader is None:
        raise ConfigError("expected_batch_size of the optimizer is None; expected a loader, which says it")
    size = optimizer.expected_batch_size or len(loader.dataset) / len(loader)
    size = max(1, round(float(size) * getattr(optimizer, "world_size", 1)))
    if not multiplier or not math.isfinite(clip):
        warnings.warn(
            f"noise_multiplier is {multiplier} and the clip {clip}: nothing is bounded",
            DoubtWarning,
            stacklevel=2,
        )
    if "Ada" in type(optimizer).__name__:
        warnings.warn(
            f"the {type(optimizer).__name__} changes its clip while it trains; {clip} is the present one",
            DoubtWarning,
            stacklevel=2,
        )
    rate = getattr(loader, "sample_rate", None)
    if loader is not None and rate is None:
        warnings.warn(
            f"the {type(loader).__name__} has no sample_rate, as Opacus's loaders have that draw each image "
            "by itself: its rate counts as 1",
            DoubtWarning,
            stacklevel=2,
        )
    return Privacy(
        clip_norm=clip,
        noise_multiplier=multiplier,
        batch_size=size,
        noise=multiplier * clip / (size if optimizer.loss_reduction == "mean" else 1),
        rate=1.0 if rate is None else float(rate),
        steps=steps,
    )
