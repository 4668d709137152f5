"""Batch norm in training mode: what the buffers that a client sent say of its images by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from invlib.core.network import in_mode, like
from invlib.core.observation import Observation
from invlib.errors import RecoveryError
from invlib.optim.coordinates import NaturalImages
from invlib.optim.statistics import LayerStatistics, batch_statistics

_DRAWN = 32  # images as photographs vary, by which the contrast behind filters is measured
_FALLOFFS = torch.linspace(0.6, 2.0, 8, dtype=torch.float64).tolist()
_ROUNDS = 50  # of Gauss-Newton, at most


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchColour:
    """What the running statistics of the first batch-norm layer say of a batch.

    Args:
        layer: name of that layer.
        mean_image: ``(1, C, H, W)`` in [0, 1], the likeliest mean of the images.
        colour: ``(C,)``, its mean over all places: the mean colour of the batch.
        deviation: ``(C,)``, by how much the colour is expected to be wrong.
        contrast: the standard deviation of the pixels of a channel about the mean colour, of the channels'
            mean square.
    """

    layer: str
    mean_image: Tensor
    colour: Tensor
    deviation: Tensor
    contrast: float


@torch.no_grad()
def buffers_alone(model: nn.Module, observation: Observation) -> BatchColour:
    r"""Return the mean colour and the contrast of a batch from the buffers that were sent, and no gradient.

    The input of the first batch-norm layer is linear in the images, mostly: a convolution. Its mean over the
    batch is therefore that of the *mean image* :math:`\bar x`, :math:`\mu = A \bar x + b`, one equation for
    each channel, and of all images that obey them the likeliest is taken, as photographs vary
    (`invlib.NaturalImages`). Its variances are those of photographs of some contrast and sharpness behind the
    same filters, and both are fitted. Noise on the update does not touch the buffers.

    Args:
        model: the model that the client received.
        observation: what the server saw of a client in training mode. Its update is not looked at.

    Raises:
        ObservationError: the observation does not fit the model.
        RecoveryError: no statistics were sent, or they are of no batch; the first layer is behind something
            that is not linear.

    Source: this project's.

    Taught in: chapter 3
    """
    model = observation.validate(model)
    name, layer, given = _first(model, observation)
    mean, variance = layer.mean, layer.variance
    encode, natural = observation.normalization.encode, NaturalImages()
    some = like(model)

    def affine(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the matrix and the offset of a function of the coordinates of an image."""
        start = torch.zeros(1, *observation.image_shape).to(some).requires_grad_()
        with torch.enable_grad():
            at_zero = function(natural.images(start))
            rows = [torch.autograd.grad(one, start, retain_graph=True)[0].flatten() for one in at_zero]
        return torch.stack(rows).double().cpu(), at_zero.detach().double().cpu()

    equations, offset = affine(lambda images: _over_places(given(encode(images))))
    colour_of, _ = affine(_over_places)
    inverse = torch.linalg.pinv(equations, rtol=1e-5)
    found = inverse @ (mean - offset)
    left = colour_of - colour_of @ inverse @ equations
    mean_image = natural.images(found.view(1, *observation.image_shape))

    still = layer.of(given(encode(mean_image.to(some)).expand(observation.num_images, -1, -1, -1)))[1]
    moving = (variance - still.double().cpu()).clamp_min(1e-3 * variance)
    contrast = _contrast(observation, given, moving, some)
    return BatchColour(
        layer=name,
        mean_image=mean_image.clamp(0, 1).to(some),
        colour=mean_image.mean((0, 2, 3)).to(some),
        deviation=(left.square().sum(1) / observation.num_images).sqrt().to(some),
        contrast=contrast,
    )


def _over_places(x: Tensor) -> Tensor:
    return x.mean([0, *range(2, x.ndim)])


def _contrast(
    observation: Observation, given: Callable[[Tensor], Tensor], variance: Tensor, some: Tensor
) -> float:
    """Return the contrast of photographs that have such variances behind the filters of a layer."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(_DRAWN, *observation.image_shape, generator=generator).to(some)
    encode, count = observation.normalization.encode, observation.num_images

    def spread(x: Tensor) -> Tensor:
        """Return the expected variance of each channel in a batch of so many of such inputs."""
        axes = [*range(2, x.ndim)]
        return (x.square().mean([0, *axes]) - x.mean(axes).square().mean(0) / count).double().cpu()

    nothing = given(encode(torch.zeros_like(drawn[:1])))
    fits = []
    for falloff in _FALLOFFS:
        images = NaturalImages(falloff=falloff, mean=0.0, contrast=1.0).images(drawn)
        ratio = (variance / spread(given(encode(images)) - nothing)).log()
        fits.append((float(ratio.var(correction=0)), float(ratio.mean().exp() * spread(images).mean())))
    return math.sqrt(min(fits)[1])


@torch.no_grad()
def with_statistics(model: nn.Module, observation: Observation, images: Tensor) -> Tensor:
    r"""Return images whose colours and contrast are those that the buffers say the batch has.

    Behind a first layer without a bias, batch norm in training mode takes away what all images have in common
    of brightness and contrast, and a search that matches gradients leaves them open. One factor and one
    offset for each channel of the images, the same for all of them, are fitted to mean and variance of the
    first batch-norm layer by Gauss-Newton.

    Args:
        model: the model that the client received.
        observation: what the server saw of a client in training mode.
        images: ``(N, C, H, W)`` in [0, 1], found by a search.

    Raises:
        RecoveryError: as for `buffers_alone`.

    Source: this project's.
    """
    _, layer, given = _first(model, observation)
    inputs = observation.normalization.encode(images.to(like(model)))
    channels = inputs.shape[1]
    alone = torch.eye(channels).to(inputs)[:, None, :, None, None]
    mean = inputs.mean((0, 2, 3), keepdim=True)
    fixed = given(torch.zeros_like(inputs))
    parts = [given(part) - fixed for part in (*(alone * (inputs - mean)), *(alone * torch.ones_like(inputs)))]
    basis, fixed = torch.stack(parts).double(), fixed.double()

    def gaps(numbers: Tensor) -> Tensor:
        return layer.gaps(torch.tensordot(numbers, basis, 1) + fixed).flatten()

    numbers = torch.cat([torch.ones_like(mean), mean]).flatten().double()
    least = gaps(numbers).square().sum()
    damping = 1e-3
    for _ in range(_ROUNDS):
        slopes, now = torch.func.jacfwd(gaps)(numbers), gaps(numbers)
        normal = slopes.T @ slopes
        step = torch.linalg.solve(normal + damping * normal.diagonal().diag(), slopes.T @ now)
        tried = gaps(numbers - step).square().sum()
        if tried < least:
            numbers, damping = numbers - step, damping / 10
            if least - tried < 1e-12 * least:
                break
            least = tried
        else:
            damping *= 10
    factor, offset = numbers.view(2, 1, channels, 1, 1).to(inputs)
    return observation.normalization.decode(factor * (inputs - mean) + offset)


def _first(
    model: nn.Module, observation: Observation
) -> tuple[str, LayerStatistics, Callable[[Tensor], Tensor]]:
    """Return the first batch-norm layer whose statistics were sent, they, and its input as a function."""
    name, layer = next(iter(batch_statistics(model, observation).items()))

    def given(inputs: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            with in_mode(model, training=False):
                model(inputs)
        finally:
            handle.remove()
        return seen[0]

    with torch.no_grad():
        draw = torch.randn(2, 1, *observation.image_shape, generator=torch.Generator().manual_seed(0))
        one, two = draw.to(like(model))
        both, apart = given(one + two) + given(torch.zeros_like(one)), given(one) + given(two)
    if not (both - apart).norm() <= 1e-3 * apart.norm():
        raise RecoveryError(
            f"the first batch-norm layer, {name!r}, is behind something that is not linear in the image; "
            "expected a convolution or a fully connected layer alone"
        )
    return name, layer, given
