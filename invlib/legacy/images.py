"""What the 2020 code measures of images, and its median filter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.errors import ConfigError
from invlib.optim import priors


def total_variation(x: Tensor) -> Tensor:
    """Return the anisotropic total variation of images ``(N, C, H, W)``, the mean over all pixels.

    Raises:
        ConfigError: wrong number of dimensions.
    """
    return priors.total_variation(x)


def psnr(img_batch: Tensor, ref_batch: Tensor, batched: bool = False, factor: float | Tensor = 1.0) -> float:
    r"""Return the peak signal-to-noise ratio in dB, :math:`10 \log_{10}(\mathrm{factor}^2 / \mathrm{mse})`.

    Args:
        img_batch: ``(N, C, H, W)``.
        ref_batch: the true images, of the same shape.
        batched: take one mean squared error of the whole batch, not the mean ratio of its images.
        factor: the range of values: 1 for images in [0, 1], 1/std for normalised ones; a tensor of one number
            per channel gives the mean ratio over the channels.

    Returns:
        The ratio; infinity where all images are equal to the true ones, NaN where a number is not finite.

    Raises:
        ConfigError: the shapes differ.
    """
    if img_batch.shape != ref_batch.shape or img_batch.ndim != 4:
        raise ConfigError(
            f"img_batch has shape {tuple(img_batch.shape)} and ref_batch {tuple(ref_batch.shape)}; "
            "expected the same (N, C, H, W)"
        )
    squares = (img_batch.detach() - ref_batch).square()
    mse = squares.mean() if batched else squares.mean((1, 2, 3)).view(-1, 1, 1, 1)
    decibels = 10 * torch.log10(torch.as_tensor(factor).to(mse) ** 2 / mse)
    return float(decibels.mean()) if torch.isfinite(mse).all() else math.nan


class MedianPool2d(nn.Module):
    """A median filter over windows of images ``(N, C, H, W)``, reflected at the border.

    Args:
        kernel_size: side of the window, or (height, width).
        stride: distance of two windows, or (vertical, horizontal).
        padding: pixels added around, or (left, right, top, bottom).
        same: choose the padding so that the size is that of the input divided by the stride.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int, int, int] = 0,
        same: bool = True,
    ) -> None:
        super().__init__()
        self.kernel_size = _repeated(kernel_size, 2)
        self.stride = _repeated(stride, 2)
        self.padding = _repeated(padding, 4)
        self.same = same

    def forward(self, x: Tensor) -> Tensor:
        """Return the filtered images; of an even number of pixels, the lower of the two middle ones."""
        padding = self.padding
        if self.same:
            top, bottom = _same(x.shape[2], self.kernel_size[0], self.stride[0])
            left, right = _same(x.shape[3], self.kernel_size[1], self.stride[1])
            padding = (left, right, top, bottom)
        windows = F.pad(x, padding, mode="reflect")
        for axis in (0, 1):
            windows = windows.unfold(2 + axis, self.kernel_size[axis], self.stride[axis])
        return windows.flatten(-2).median(-1).values


def _repeated(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the pixels to add before and after, so that ceil(size / stride) windows fit."""
    missing = max(kernel - (size % stride or stride), 0)
    return missing // 2, missing - missing // 2
