"""What the 2020 code measures of images, and its median filter."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.core.network import in_mode
from invlib.core.optional import torchvision
from invlib.errors import ConfigError
from invlib.models.imagenet import pretrained
from invlib.optim import priors

Sides = int | Sequence[int]


def total_variation(x: Tensor) -> Tensor:
    """Return the anisotropic total variation of images ``(N, C, H, W)``, the mean over all pixels."""
    return priors.total_variation(x)


def psnr(img_batch: Tensor, ref_batch: Tensor, batched: bool = False, factor: float | Tensor = 1.0) -> float:
    r"""Return the peak signal-to-noise ratio in dB, :math:`10 \log_{10}(\mathrm{factor}^2 / \mathrm{mse})`.

    It is infinity where all images are the true ones, and NaN where a number is not finite. ConfigError where
    the shapes differ.

    Args:
        img_batch: ``(N, C, H, W)``.
        ref_batch: the true images, of the same shape.
        batched: take one mean squared error of the whole batch, not the mean ratio of its images.
        factor: the range of values: 1 for images in [0, 1], 1/std for normalised ones, of one for each
            channel the ratios are averaged.
    """
    if img_batch.shape != ref_batch.shape or img_batch.ndim != 4:
        shapes = f"img_batch has shape {tuple(img_batch.shape)} and ref_batch {tuple(ref_batch.shape)}"
        raise ConfigError(f"{shapes}; expected the same (N, C, H, W)")
    squares = (img_batch.detach() - ref_batch).square()
    mse = squares.mean() if batched else squares.mean((1, 2, 3)).view(-1, 1, 1, 1)
    decibels = 10 * torch.log10(torch.as_tensor(factor).to(mse) ** 2 / mse)
    return float(decibels.mean()) if torch.isfinite(mse).all() else math.nan


def activation_errors(model: nn.Module, x1: Tensor, x2: Tensor) -> dict[str, dict[str, float]]:
    """Return how far each module's inputs are apart for two batches of images ``(N, C, H, W)``, normalised.

    The network runs in evaluation mode and is not changed. ``"se"``, ``"mse"`` and ``"sim"`` are the sum and
    the mean of the squared differences and the cosine of the whole batches, each by the modules' names, in
    the order in which these end their work. ConfigError where the shapes differ.
    """
    if x1.shape != x2.shape:
        raise ConfigError(f"x1 has shape {tuple(x1.shape)} and x2 {tuple(x2.shape)}; expected the same")
    errors: dict[str, dict[str, float]] = {"se": {}, "mse": {}, "sim": {}}
    names = {module: name for name, module in model.named_modules()}

    def measure(module: nn.Module, inputs: tuple[Any, ...], _: object) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].shape[:1] == (2 * len(x1),):
            a, b = (half.flatten() for half in inputs[0].split(len(x1)))
            squares = (a - b).square()
            errors["se"][names[module]] = float(squares.sum())
            errors["mse"][names[module]] = float(squares.mean())
            errors["sim"][names[module]] = float(torch.cosine_similarity(a, b, dim=0))

    hooks = [module.register_forward_hook(measure) for module in names]
    try:
        with torch.no_grad(), in_mode(model, training=False):
            model(torch.cat([x1, x2]).to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return errors


class InceptionScore(nn.Module):
    """The mean entropy of Inception v3's prediction: low where it is sure what the images show.

    It takes ``batch_size`` images at a time. DataError where the network cannot be fetched.
    """

    def __init__(self, batch_size: int = 32, setup: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        tensors, zoo = pretrained("inception_v3", "IMAGENET1K_V1"), torchvision().models
        self.model = zoo.inception_v3(weights=None, init_weights=False, transform_input=True)
        self.model.load_state_dict(tensors)
        self.model.to(**(setup or {})).eval()
        self.preprocessing = nn.Upsample(size=(299, 299), mode="bilinear", align_corners=False)
        self.batch_size = batch_size

    @torch.no_grad()
    def forward(self, image_batch: Tensor) -> Tensor:
        """Return the entropy, a scalar, for normalised images ``(N, C, H, W)``."""
        parts = image_batch.expand(-1, 3, -1, -1).split(self.batch_size)
        logits = torch.cat([self.model(self.preprocessing(part)) for part in parts])
        entropy: Tensor = torch.special.entr(logits.softmax(-1)).mean()
        return entropy


class MedianPool2d(nn.Module):
    """A median filter over windows of images ``(N, C, H, W)``, reflected at the border.

    Args:
        kernel_size: side of the window, or (height, width).
        stride: distance of two windows, or (vertical, horizontal).
        padding: pixels added around, or (left, right, top, bottom).
        same: choose the padding so that the size is that of the input divided by the stride.
    """

    def __init__(
        self, kernel_size: Sides = 3, stride: Sides = 1, padding: Sides = 0, same: bool = True
    ) -> None:
        super().__init__()
        counts = ((kernel_size, 2), (stride, 2), (padding, 4))
        sides = [(value,) * count if isinstance(value, int) else tuple(value) for value, count in counts]
        self.kernel_size, self.stride, self.padding = sides
        self.same = same

    def forward(self, x: Tensor) -> Tensor:
        """Return the filtered images; of an even number of pixels, the lower of the two middle ones."""
        padding = self.padding
        if self.same:
            # So many are added that ceil(size / stride) windows fit.
            sides = zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
            high, wide = (max(kernel - (size % stride or stride), 0) for size, kernel, stride in sides)
            padding = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
        windows = F.pad(x, padding, mode="reflect")
        for axis in (0, 1):
            windows = windows.unfold(2 + axis, self.kernel_size[axis], self.stride[axis])
        return windows.flatten(-2).median(-1).values
