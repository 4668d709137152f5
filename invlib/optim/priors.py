"""What is known of images before any gradient is seen: ``(inputs) -> scalar``, lower is likelier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib import kernels
from invlib.core.network import forward, in_mode, trainable_parameters
from invlib.errors import ConfigError

Prior = Callable[[Tensor], Tensor]


def total_variation(inputs: Tensor, *, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    r"""Return the anisotropic total variation of a batch: how much neighbouring pixels differ.

    .. math:: \frac{1}{n_h}\sum |x_{i,j+1} - x_{i,j}| + \frac{1}{n_v}\sum |x_{i+1,j} - x_{i,j}|

    Args:
        inputs: ``(N, C, H, W)``, in whatever units the attack works in.
        reduction: ``"mean"`` averages horizontal and vertical differences each over their own number,
            as above; ``"sum"`` adds them all up.

    Raises:
        ConfigError: wrong number of dimensions, a side under 2 pixels, or an unknown reduction.

    Source: Rudin, Osher and Fatemi 1992; as a prior for gradient matching, Geiping et al. 2020,
    arXiv 2003.14053, equation 4.

    Taught in: chapter 2
    """
    return kernels.total_variation(inputs, reduction=reduction)


def rounded_total_variation(inputs: Tensor, *, width: float = 1e-2) -> Tensor:
    r"""Return total variation that is smooth at zero, for optimisers that need a smooth cost.

    .. math:: \frac{1}{n_h}\sum \sqrt{(x_{i,j+1} - x_{i,j})^2 + \epsilon^2}
              + \frac{1}{n_v}\sum \sqrt{(x_{i+1,j} - x_{i,j})^2 + \epsilon^2}

    Args:
        inputs: ``(N, C, H, W)``, in whatever units the attack works in.
        width: :math:`\epsilon`, the difference below which a step between pixels counts less.

    Raises:
        ConfigError: width is not positive.

    Source: Charbonnier et al. 1994, "Two deterministic half-quadratic regularization algorithms".
    """
    if not width > 0:
        raise ConfigError(f"rounded_total_variation width is {width}; expected a positive number")
    across = inputs[..., 1:] - inputs[..., :-1]
    down = inputs[..., 1:, :] - inputs[..., :-1, :]
    return sum(((d.square() + width**2).sqrt().mean() for d in (across, down)), inputs.new_zeros(()))


def l2_norm(inputs: Tensor) -> Tensor:
    """Return the mean square of the inputs, which pulls them to the data's mean.

    Args:
        inputs: ``(N, C, H, W)``, normalised.

    Source: Yin et al. 2021, arXiv 2104.07586, section 3.2.
    """
    return inputs.square().mean()


def batch_norm_statistics(model: nn.Module, statistics: Mapping[str, Tensor] | None = None) -> Prior:
    r"""Return a prior that compares a batch's statistics at each batch-norm layer with known ones.

    The prior is :math:`\sum_l \|\mu_l(x) - \mu_l\|_2 + \|\sigma^2_l(x) - \sigma^2_l\|_2`, where the known
    values are the model's running statistics, or those in ``statistics``.

    Args:
        model: a model with batch-norm layers.
        statistics: buffer name → tensor, for example what a client sent; None takes the model's own.

    Raises:
        ConfigError: the model has no batch-norm layer with running statistics.

    Source: Yin et al. 2021, arXiv 2104.07586, equation 6.

    Taught in: chapter 3
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has 0 batch-norm layers with running statistics; expected at least one"
        )
    params = trainable_parameters(model)
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()} | dict(statistics or {})

    def prior(inputs: Tensor) -> Tensor:
        terms: list[Tensor] = []

        def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                x = arguments[0]
                axes = [0, *range(2, x.ndim)]
                mean, variance = x.mean(axes), x.var(axes, correction=0)
                terms.append(_norm(mean - buffers[f"{name}.running_mean"]))
                terms.append(_norm(variance - buffers[f"{name}.running_var"]))

            return hook

        handles = [module.register_forward_pre_hook(compare(name)) for name, module in layers.items()]
        try:
            with in_mode(model, training=False):
                forward(model, params, buffers, inputs)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(terms).sum()

    return prior


def _norm(x: Tensor) -> Tensor:
    return x.square().sum().clamp_min(torch.finfo(x.dtype).tiny).sqrt()


def median_filter(images: Tensor, size: int = 3) -> Tensor:
    """Return every pixel replaced by the median of the square around it, reflected at the border.

    Args:
        images: ``(N, C, H, W)``.
        size: the side of the square, odd.

    Raises:
        ConfigError: size is even or not positive.

    Taught in: chapter 2
    """
    if size < 1 or size % 2 == 0:
        raise ConfigError(f"median filter size is {size}; expected an odd positive number")
    half = size // 2
    padded = F.pad(images, (half, half, half, half), mode="reflect")
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)
    return windows.flatten(-2).median(-1).values
