"""All measures of a reconstruction at once, its images in the order of the truth."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from invlib.core.reconstruction import Reconstruction
from invlib.metrics.quality import SSIM_SIDE, _check, mse, psnr, ssim


def matching_order(images: Tensor, truth: Tensor) -> Tensor:
    """Return which reconstruction belongs to each true image, by the assignment of least squared error.

    The order of a batch leaves no trace in its mean gradient, so it is matched before comparing.

    Args:
        images: ``(N, C, H, W)`` in [0, 1].
        truth: images of the same shape.

    Returns:
        int64 ``(N,)``: ``images[order]`` is in the truth's order.

    Raises:
        ConfigError: the shapes differ.

    Taught in: chapter 4
    """
    _check(images, truth)
    cost = torch.cdist(truth.flatten(1).double(), images.flatten(1).double()).square()
    # A broken image is as far from every true one as can be; a larger number would drown the others.
    furthest = 4.0 * truth[0].numel()
    finite = torch.nan_to_num(cost, nan=furthest, posinf=furthest)
    return torch.as_tensor(
        linear_sum_assignment(finite.cpu().numpy())[1], dtype=torch.int64, device=images.device
    )


@dataclass(frozen=True, kw_only=True)
class Report:
    """How close a reconstruction is to the truth, beside what no attack at all would give.

    Args:
        images: the reconstructed images ``(N, C, H, W)``, like all that follows in the truth's order.
        mse: one number for each image.
        psnr: likewise, in dB.
        ssim: likewise; empty for images under 11 pixels a side.
        order: which image of the reconstruction was matched to each true one.
        labels_right: how many of the labels are right, as a multiset; None where there are none.
        num_images: how many images there are.
        grey_psnr: the PSNR of a plain mid-grey image against each true one.
        mean_image_psnr: the PSNR of the mean of the true images (for one image, of its mean colour).
    """

    images: Tensor = field(repr=False, compare=False)
    mse: tuple[float, ...]
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    order: tuple[int, ...]
    labels_right: int | None
    num_images: int
    grey_psnr: tuple[float, ...]
    mean_image_psnr: tuple[float, ...]

    @property
    def mean_psnr(self) -> float:
        """The mean of `psnr` over the images, in dB."""
        return _mean(self.psnr)

    @property
    def mean_mse(self) -> float:
        """The mean of `mse` over the images."""
        return _mean(self.mse)

    @property
    def mean_ssim(self) -> float:
        """The mean of `ssim` over the images; NaN where their sides are under 11 pixels."""
        return _mean(self.ssim)

    def __str__(self) -> str:
        lines = [f"PSNR {self.mean_psnr:6.2f} dB   MSE {self.mean_mse:.2e}"]
        if self.ssim:
            lines[0] += f"   SSIM {self.mean_ssim:.3f}"
        grey, mean = _mean(self.grey_psnr), _mean(self.mean_image_psnr)
        lines.append(f"floors: grey image {grey:.2f} dB, mean image {mean:.2f} dB")
        if self.labels_right is not None:
            lines.append(f"labels right: {self.labels_right} of {self.num_images}")
        return "\n".join(lines)


def evaluate(reconstruction: Reconstruction, truth: Tensor, labels: Tensor | None = None) -> Report:
    """Compare a reconstruction with the truth, after matching the order of the batch.

    Args:
        reconstruction: what an attack returned.
        truth: the private images ``(N, C, H, W)`` in [0, 1].
        labels: the private labels, int64 ``(N,)``.

    Raises:
        ConfigError: the shapes differ.

    Taught in: chapter 2
    """
    order = matching_order(reconstruction.images, truth)
    images = reconstruction.images[order]
    right = None
    if labels is not None and reconstruction.labels is not None:
        right = (Counter(labels.tolist()) & Counter(reconstruction.labels.tolist())).total()
    grey = torch.full_like(truth, 0.5)
    mean = truth.mean(0, keepdim=True) if len(truth) > 1 else truth.mean((2, 3), keepdim=True)
    return Report(
        images=images,
        mse=_floats(mse(images, truth)),
        psnr=_floats(psnr(images, truth)),
        ssim=_floats(ssim(images, truth)) if min(truth.shape[2:]) >= SSIM_SIDE else (),
        order=tuple(order.tolist()),
        labels_right=right,
        num_images=len(truth),
        grey_psnr=_floats(psnr(grey, truth)),
        mean_image_psnr=_floats(psnr(mean.expand_as(truth), truth)),
    )


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values) if values else math.nan
