"""How close images are to the truth, which is the second argument of all that measures.

Every measure is computed in double precision on [0, 1], whatever type the images have: NumPy arrays are
taken, and bytes are divided by 255.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invlib.core.optional import torchvision
from invlib.errors import ConfigError, DataError, DeviceError

SSIM_SIDE = 11  # pixels, the side of its window


_ROUNDING = 1e-3  # closed forms overshoot [0, 1] by so much; more is another scale


def unit_images(images: Any, name: str) -> Tensor:
    """Return images ``(N, C, H, W)`` in double precision, bytes divided by 255.

    Raises:
        ConfigError: they are no array of numbers, integers other than bytes, or of another shape.
    """
    try:
        tensor = torch.as_tensor(images if isinstance(images, Tensor) else np.asarray(images))
    except (TypeError, ValueError) as error:
        what = type(images).__name__
        raise ConfigError(
            f"{name} is a {what}; expected a tensor or array (N, C, H, W) of numbers"
        ) from error
    if tensor.ndim != 4 or not tensor.numel():
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; expected (N, C, H, W), none of them zero")
    if tensor.is_meta or tensor.layout is not torch.strided:
        raise ConfigError(f"{name} is on {tensor.device}, {tensor.layout}; expected numbers at hand")
    if tensor.dtype == torch.uint8:
        return tensor.double() / 255
    if not tensor.is_floating_point():
        raise ConfigError(f"{name} has type {tensor.dtype}; expected floating point in [0, 1], or uint8")
    return tensor.double()


def originals(truth: Any, name: str = "the truth") -> Tensor:
    """Return private images as `unit_images` does, once they were seen to lie in [0, 1].

    Raises:
        ConfigError: they do not, or are not finite.
    """
    tensor = unit_images(truth, name)
    low, high = tensor.min().item(), tensor.max().item()
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # so written that NaN fails too
        raise ConfigError(
            f"{name} lies in [{low:.4g}, {high:.4g}]; expected [0, 1] (decode normalised images, "
            "divide those of 0 to 255)"
        )
    return tensor


def pair(images: Any, truth: Any) -> tuple[Tensor, Tensor]:
    """Return images and their originals in double precision on one device.

    Raises:
        ConfigError: the shapes differ, a type is wrong, or the truth does not lie in [0, 1].
    """
    shapes = [tuple(getattr(given, "shape", ())) for given in (images, truth)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"images have shape {shapes[0]} and the truth {shapes[1]}; expected the same (N, C, H, W)"
        )
    found = unit_images(images, "images")
    return found, originals(truth).to(found.device)


def mse(images: Tensor, truth: Tensor) -> Tensor:
    """Return the mean squared error of each image.

    Args:
        images: ``(N, C, H, W)`` in [0, 1].
        truth: images of the same shape.

    Returns:
        ``(N,)``.

    Raises:
        ConfigError: the shapes differ, or the truth does not lie in [0, 1].
    """
    images, truth = pair(images, truth)
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
        ConfigError: as for `mse`, or a side is under 11 pixels.

    Source: Wang et al. 2004, computed by torchmetrics.
    """
    images, truth = pair(images, truth)
    if min(images.shape[2:]) < SSIM_SIDE:
        got = tuple(images.shape[2:])
        raise ConfigError(f"ssim needs images of {SSIM_SIDE} pixels a side or more, got {got}")
    functional = _torchmetrics()
    value = functional.structural_similarity_index_measure(images, truth, data_range=1.0, reduction="none")
    return torch.as_tensor(value).reshape(-1)


def lpips(images: Tensor, truth: Tensor) -> Tensor:
    """Return the learned perceptual distance of each image (AlexNet), 0 for a perfect one.

    Arguments as for `mse`; one-channel images are repeated to three, and numbers outside [0, 1] are cut off.

    Raises:
        ConfigError: as for `mse`, or the images have neither one channel nor three.
        DataError: the AlexNet weights are not at hand and cannot be fetched.

    Source: Zhang et al. 2018, arXiv 1801.03924, computed by torchmetrics.
    """
    images, truth = (part.float().clamp(0, 1) for part in pair(images, truth))
    if images.shape[1] not in (1, 3):
        raise ConfigError(f"lpips was given images of {images.shape[1]} channels; expected 1 or 3")
    _torchmetrics()
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        with torch.random.fork_rng(devices=[]):  # torchvision draws weights before it loads others
            distance = LearnedPerceptualImagePatchSimilarity(
                net_type="alex", normalize=True, reduction="mean"
            )
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
