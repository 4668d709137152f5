"""Closed forms of updates with noise: the likeliest input of a layer, and how well it is determined."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from invlib.core.normalization import Normalization
from invlib.errors import RecoveryError
from invlib.optim.coordinates import NaturalImages

_CONTRASTS = [2.0 ** (k / 2) for k in range(-8, 5)]  # of an image's variance beside that of photographs
_STEP = 0.19
_SIZES = [s * (1 + _STEP) ** k for k in range(-10, 11) for s in (1, -1)]  # of a, over that of numbers near 1


@dataclass(frozen=True, kw_only=True)
class NoisyInput:
    """What a fully connected layer's gradient with noise says about the image that it was given.

    Args:
        inputs: the normalised image ``(C, H, W)``.
        expected_psnr: in dB, of images that vary as photographs do.
        residual: the share of the weight's gradient that it leaves unexplained, in [0, 1].
        signal: the squared cosine of the strongest direction with the image's, in [0, 1]; 0 where noise alone
            is as strong.
    """

    inputs: Tensor
    expected_psnr: float
    residual: float
    signal: float


def noisy_layer_input(
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    noise: float,
    *,
    like: Tensor,
    normalization: Normalization,
    prior: NaturalImages | None = None,
    unlikely: Callable[[Tensor], float] | None = None,
) -> NoisyInput:
    r"""Recover the one image that a fully connected layer was given, from gradients with Gaussian noise.

    Without noise :math:`[G\; b] = \delta\, [x^\top\; 1]` has rank one; with noise of one size in all numbers,
    the likeliest :math:`\delta` is along the first left singular vector u of both together, to which every
    pixel contributes, and not along the noisy b. Then :math:`z = G^\top u` is :math:`a x` with noise
    of :math:`\tau`, :math:`a = u^\top b`, and in the components that vary independently in photographs,
    with means :math:`\mu` and variances :math:`\kappa p`,

    .. math:: \hat x = \mu + \frac{a \kappa p}{a^2 \kappa p + \tau^2}\, (z - a \mu).

    The contrast :math:`\kappa` is the likeliest of z. That u follows the noise a little makes :math:`\tau`
    larger than :math:`\sigma`, as large matrices say of their singular vectors. Rows of several rounds with
    the same image, each over its own :math:`\sigma`, may be given one below the other, since they have the
    same x.

    Args:
        weight_gradient: ``(out, C * H * W)``.
        bias_gradient: ``(out,)``.
        noise: the standard deviation :math:`\sigma` of what was added to each number of both, above 0.
        like: a tensor of the image's shape ``(C, H, W)``.
        normalization: how the client encodes images.
        prior: how images vary; None takes `invlib.NaturalImages()`.
        unlikely: how badly normalised images ``(C, H, W)`` agree with the rest of the update. The number a,
            in which b alone has all its noise, is then one, of either sign, whose image agrees best.

    Raises:
        RecoveryError: noise is not above 0, or the shapes do not fit.

    Source: this project's; without the image's prior it is total least squares, Golub and Van Loan 1980; of
    singular vectors under noise, Benaych-Georges and Nadakuditi 2012, arXiv 1103.2221.
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
        squares, vectors = torch.linalg.eigh(both @ both.T)
        signal = vectors[:, -1]
    else:
        squares, vectors = torch.linalg.eigh(both.T @ both)
        signal = both @ vectors[:, -1]
    signal = signal / signal.norm()
    share = _share(float(squares[-1]), len(both) * noise**2, both.shape[1] * noise**2)
    spread = math.sqrt(float(squares[-1]) * (1 - share) / both.shape[1])
    seen = parts.of((weight.T @ signal).view(like.shape))

    def at(size: float) -> tuple[Tensor, float]:
        gap = seen - size * parts.mean

        def misfit(contrast: float) -> float:
            total = size**2 * contrast * parts.variance + spread**2
            return float((gap.square() / total + total.log()).sum())

        variance = min(_CONTRASTS, key=misfit) * parts.variance
        total = size**2 * variance + spread**2
        left = variance * spread**2 / total  # the error of x
        if unlikely is None:  # and that of a
            by_size = (spread**2 - size**2 * variance) * gap / total - size * parts.mean
            left = left + (noise * variance / total * by_size).square()
        error = float((parts.weight[:, None, None] * left).sum()) / like.numel()
        return parts.inputs(parts.mean + size * variance / total * gap), error

    size = float(signal @ bias)
    if unlikely is not None:
        near_one = math.sqrt(share * float(squares[-1]) / both.shape[1])
        ends = size - 3 * noise, size + 3 * noise  # what b alone leaves possible
        sizes = [size, *(near_one * size for size in _SIZES if ends[0] < near_one * size < ends[1])]
        size = min(sizes, key=lambda size: unlikely(at(size)[0].to(like)))
        step = _STEP * abs(size)
        found = minimize_scalar(
            lambda size: unlikely(at(size)[0].to(like)),
            bounds=(max(size - step, ends[0]), min(size + step, ends[1])),
            method="bounded",
        )
        size = found.x
    inputs, error = at(size)
    flat = inputs.flatten()
    rest = weight - torch.outer(weight @ flat / flat.square().sum().clamp_min(1e-300), flat)
    return NoisyInput(
        inputs=inputs.to(weight_gradient),
        expected_psnr=-10 * math.log10(max(error, 1e-30)),
        residual=float(rest.norm() / weight.norm()),
        signal=share,
    )


def _share(square: float, rows: float, columns: float) -> float:
    r"""Return how much of a right singular vector is signal: its squared cosine with that of rank one.

    Args:
        square: the largest singular value, squared.
        rows: how many there are, times the variance of the noise.
        columns: the same.
    """
    apart = square - rows - columns
    if apart <= 2 * math.sqrt(rows * columns):
        return 0.0  # no larger than noise alone makes it
    clean = (apart + math.sqrt(apart**2 - 4 * rows * columns)) / 2
    return (clean**2 - rows * columns) / (clean * (clean + columns))
