"""Closed forms of updates with noise: the likeliest input of a layer, and how well it is determined."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invlib.core.normalization import Normalization
from invlib.errors import RecoveryError
from invlib.optim.coordinates import NaturalImages

_ROUNDS = 3  # of signals after the image, and the image after them
_CONTRASTS = [2.0 ** (k / 2) for k in range(-8, 5)]  # of an image's variance beside that of photographs


@dataclass(frozen=True, kw_only=True)
class NoisyInput:
    """What a fully connected layer's gradient with noise says about the image that it was given.

    Args:
        inputs: the normalised image ``(C, H, W)``.
        expected_psnr: in dB, of images that vary as photographs do.
        residual: the share of the weight's gradient that it leaves unexplained, in [0, 1].
    """

    inputs: Tensor
    expected_psnr: float
    residual: float


def noisy_layer_input(
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    noise: float,
    *,
    like: Tensor,
    normalization: Normalization,
    prior: NaturalImages | None = None,
) -> NoisyInput:
    r"""Recover the one image that a fully connected layer was given, from gradients with Gaussian noise.

    Without noise :math:`[G\; b] = \delta\, [x^\top\; 1]` has rank one; with noise of one size in all numbers,
    the likeliest :math:`\delta` is along the first left singular vector u of both together, to which every
    pixel contributes, and not along the noisy b. Then :math:`z = G^\top u` is :math:`a x` with noise
    of :math:`\sigma`, :math:`a = u^\top b`, and in the components that vary independently in photographs,
    with means :math:`\mu` and variances :math:`\kappa p`,

    .. math:: \hat x = \mu + \frac{a \kappa p}{a^2 \kappa p + \sigma^2}\, (z - a \mu).

    The contrast :math:`\kappa` is the likeliest of z. With :math:`\hat x` follows a better
    :math:`u \propto G \hat x + b`, and so on. Rows of several rounds with the same image, each over its own
    :math:`\sigma`, may be given one below the other, since they have the same x.

    Args:
        weight_gradient: ``(out, C * H * W)``.
        bias_gradient: ``(out,)``.
        noise: the standard deviation :math:`\sigma` of what was added to each number of both, above 0.
        like: a tensor of the image's shape ``(C, H, W)``.
        normalization: how the client encodes images.
        prior: how images vary; None takes `invlib.NaturalImages()`.

    Raises:
        RecoveryError: noise is not above 0, or the shapes do not fit.

    Source: this project's; without the image's prior it is total least squares, Golub and Van Loan 1980.
    """
    if not 0 < noise < math.inf or weight_gradient.shape != (len(bias_gradient), like.numel()):
        raise RecoveryError(
            f"noise is {noise} and the gradients have shapes {tuple(weight_gradient.shape)} and "
            f"{tuple(bias_gradient.shape)}; expected noise above 0, (out, {like.numel()}) and (out,)"
        )
    weight, bias = weight_gradient.double(), bias_gradient.double()
    parts = (prior or NaturalImages()).components(normalization, like.to(weight))
    both = torch.cat([weight, bias[:, None]], 1)
    if len(both) <= both.shape[1]:
        signal = torch.linalg.eigh(both @ both.T)[1][:, -1]
    else:
        signal = both @ torch.linalg.eigh(both.T @ both)[1][:, -1]
    for _ in range(_ROUNDS):
        signal = signal / signal.norm()
        size = signal @ bias
        seen = parts.of((weight.T @ signal).view(like.shape))
        gap = seen - size * parts.mean

        def unlikely(contrast: float, gap: Tensor = gap, size: Tensor = size) -> float:
            total = size**2 * contrast * parts.variance + noise**2
            return float((gap.square() / total + total.log()).sum())

        variance = min(_CONTRASTS, key=unlikely) * parts.variance
        total = size**2 * variance + noise**2
        found = parts.mean + size * variance / total * gap
        inputs = parts.inputs(found)
        signal = weight @ inputs.flatten() + bias
    by_size = (
        variance / total**2 * (noise**2 - size**2 * variance) * gap - size * variance / total * parts.mean
    )
    left = variance * noise**2 / total + (noise * by_size).square()  # the error of x, and that of a
    error = float((parts.weight[:, None, None] * left).sum()) / like.numel()
    flat = inputs.flatten()
    rest = weight - torch.outer(weight @ flat / flat.square().sum().clamp_min(1e-300), flat)
    return NoisyInput(
        inputs=inputs.to(weight_gradient),
        expected_psnr=-10 * math.log10(max(error, 1e-30)),
        residual=float(rest.norm() / weight.norm()),
    )
