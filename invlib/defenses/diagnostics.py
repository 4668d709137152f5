"""How an update changes with the image, near one image: numbers that describe, and bound nothing.

A network with ReLU sends a gradient that jumps wherever a unit switches on, and no derivative sees a jump.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invlib.core.network import forward, in_mode, trainable_parameters, unwrapped
from invlib.core.normalization import Normalization
from invlib.core.observation import Loss
from invlib.errors import ConfigError, DoubtWarning
from invlib.optim.coordinates import NaturalImages
from invlib.settings import Positive, checks

_MOST = 2**28  # numbers of a Jacobian
_KINKS = (
    "Relu",
    "Threshold",
    "Hardtanh",
    "MaxPool",
    "Abs",
    "Clamp",
)  # in names of autograd's nodes


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalSpectrum:
    """How far the gradient of one image tells images near it apart; nothing here bounds an attack.

    Args:
        singular_values: of the Jacobian of the update in the image's pixels, descending, float64.
        rank: how many of them are above the noise.
        expected_psnr: in dB, what the linear least squares at this point would reach with the covariance of
            photographs. An attack that is above it has met a kink, or knows more of images.
        i2f: how far the noise moves the image in the sense of Zhang et al., ``|J^T noise| / largest(J^T J)``.
        smooth: whether the gradient has a derivative everywhere: the network has neither ReLU nor the like.
    """

    singular_values: Tensor
    rank: int
    expected_psnr: float
    i2f: float
    smooth: bool


@checks
def local_spectrum(
    model: nn.Module,
    image: Tensor,
    label: Tensor,
    *,
    normalization: Normalization,
    noise: Positive,
    photographs: NaturalImages | None = None,
    loss: Loss = F.cross_entropy,
) -> LocalSpectrum:
    r"""Return the spectrum of the gradient's Jacobian at one image, as a local diagnosis.

    .. math:: \text{PSNR} = -10 \log_{10} \frac1d \operatorname{tr}
        \Big( \frac{J^\top J}{s^2} + \Sigma^{-1} \Big)^{-1}, \quad J = \frac{\partial g}{\partial x}

    Args:
        model: the network, in evaluation mode here.
        image: ``(1, C, H, W)`` in [0, 1].
        label: int64 ``(1,)``.
        normalization: how the client encodes images.
        noise: :math:`s`, the standard deviation of the noise on each number; without noise, of the rounding.
        photographs: whose covariance :math:`\Sigma` is; None takes `invlib.NaturalImages`.
        loss: the client's loss ``(logits, labels) -> scalar``.

    Raises:
        ConfigError: a setting is out of range, or the Jacobian has more than 2²⁸ numbers.

    Warns:
        DoubtWarning: the gradient jumps (ReLU and the like), so that even an unbiased attacker may do better.

    Source: Van Trees 1968, for the posterior of a linear map; Zhang et al. 2023, arXiv 2309.13016, for I2F.

    Taught in: chapter 8
    """
    model = unwrapped(model)
    params = trainable_parameters(model)
    pixels, numbers = image.numel(), sum(p.numel() for p in params.values())
    if pixels * numbers > _MOST:
        raise ConfigError(f"the Jacobian has {numbers} x {pixels} numbers; expected {_MOST} at most")
    buffers = dict(model.named_buffers())

    def value(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(forward(model, params, buffers, normalization.encode(x)), label)

    def gradient(x: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.func.grad(value)(params, x).values()])

    def along(direction: Tensor) -> Tensor:
        slope: Tensor = torch.func.jvp(gradient, (image.detach(),), (direction,))[1]
        return slope

    with in_mode(model, training=False):
        columns = torch.func.vmap(along, chunk_size=64)(torch.eye(pixels).to(image).view(-1, *image.shape))
        tracked = {name: p.clone().requires_grad_() for name, p in params.items()}
        smooth = not _kinks(value(tracked, image).grad_fn)
    if not smooth:
        warnings.warn(
            "the network has ReLU or the like: its gradient jumps where a unit switches, which no derivative "
            "sees, so that these numbers are no bound on any attacker",
            DoubtWarning,
            stacklevel=2,
        )
    squared = (columns @ columns.T).double()
    values = torch.linalg.eigvalsh(squared).clamp_min(0).flip(0).sqrt()
    if photographs is None:
        photographs = NaturalImages()
    unit = torch.eye(pixels, dtype=torch.float64).view(pixels, *image.shape[1:])
    spread = (photographs.images(unit) - photographs.mean).view(pixels, pixels).T  # white noise to an image
    known = torch.eye(pixels, dtype=torch.float64) + spread.T @ squared @ spread / noise**2
    error = torch.linalg.solve(known, spread.T @ spread).trace() / pixels
    return LocalSpectrum(
        singular_values=values,
        rank=int((values > noise).sum()),
        expected_psnr=-10 * math.log10(float(error)),
        i2f=noise * float(values.norm()) / max(float(values[0]) ** 2, torch.finfo(torch.float64).tiny),
        smooth=smooth,
    )


def _kinks(node: Any) -> bool:
    """Say whether a graph of autograd has an operation whose derivative jumps."""
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(word in node.name() for word in _KINKS) and "Gelu" not in node.name():
            return True
        waiting += [following for following, _ in node.next_functions]
    return False
