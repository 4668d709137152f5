"""How close images are to the truth, which is the second argument of all that measures."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from invlib.core.optional import torchvision
from invlib.errors import ConfigError, DataError, DeviceError

SSIM_SIDE = 11  # pixels, the side of its window


def _check(images: Tensor, truth: Tensor) -> None:
    if images.ndim != 4 or images.shape != truth.shape:
        raise ConfigError(
            f"images have shape {tuple(images.shape)} and the truth {tuple(truth.shape)}; "
            "expected the same (N, C, H, W)"
        )


def mse(images: Tensor, truth: Tensor) -> Tensor:
    """Return the mean squared error of each image.

    Args:
        images: ``(N, C, H, W)`` in [0, 1].
        truth: images of the same shape.

    Returns:
        ``(N,)``.

    Raises:
        ConfigError: the shapes differ.
    """
    _check(images, truth)
    return (images - truth).square().flatten(1).mean(1)


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    r"""Return the peak signal-to-noise ratio of each image in dB, :math:`-10 \log_{10} \mathrm{mse}`.

    Arguments and errors as for `mse`; a perfect image gives infinity.

    Example:
        >>> psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.1)).round().tolist()
        [20.0]

    Taught in: chapter 1
    """
    return -10 * mse(images, truth).log10()


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity of each image, 1 for a perfect one.

    Arguments as for `mse`; Gaussian window of 11 pixels, standard deviation 1.5, data range 1, borders
    reflected.

    Raises:
        ConfigError: the shapes differ, or a side is under 11 pixels.

    Source: Wang et al. 2004, computed by torchmetrics.
    """
    _check(images, truth)
    if min(images.shape[2:]) < SSIM_SIDE:
        got = tuple(images.shape[2:])
        raise ConfigError(f"ssim needs images of {SSIM_SIDE} pixels a side or more, got {got}")
    functional = _torchmetrics()
    value = functional.structural_similarity_index_measure(images, truth, data_range=1.0, reduction="none")
    return torch.as_tensor(value).reshape(-1)


def lpips(images: Tensor, truth: Tensor) -> Tensor:
    """Return the learned perceptual distance of each image (AlexNet), 0 for a perfect one.

    Arguments as for `mse`; one-channel images are repeated to three.

    Raises:
        ConfigError: the shapes differ.
        DataError: the AlexNet weights are not at hand and cannot be fetched.

    Source: Zhang et al. 2018, arXiv 1801.03924, computed by torchmetrics.
    """
    _check(images, truth)
    _torchmetrics()
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        distance = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True, reduction="mean")
    except (OSError, ModuleNotFoundError) as error:
        raise DataError(
            f"LPIPS needs torchvision's AlexNet weights, which cannot be fetched here: {error}"
        ) from error
    distance = distance.to(images.device)
    pairs = zip(images.expand(-1, 3, -1, -1), truth.expand(-1, 3, -1, -1), strict=True)
    return torch.stack([distance(a[None], b[None]).detach() for a, b in pairs])


def _torchmetrics() -> Any:
    # torchmetrics imports torchvision where it is installed, so it has to be mended first.
    with contextlib.suppress(DeviceError):
        torchvision()
    import torchmetrics.functional.image as functional

    return functional
