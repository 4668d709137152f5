"""Where a search begins that has no image to start from: coordinates of photographs, and patterns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from invlib.core.normalization import Normalization
from invlib.optim.priors import Prior
from invlib.settings import Below1, Checked, NotNegative, Part, Positive, whole


@dataclass(frozen=True, kw_only=True)
class NaturalImages(Checked):
    r"""What all photographs have in common, as a change of coordinates and a prior.

    Their brightness varies most over long distances: at spatial frequency :math:`f` its amplitude falls
    about as :math:`1/f`. Their colour channels vary together. An image :math:`x` in [0, 1] is therefore
    written as

    .. math:: x = \mu + \sigma\, (D_H \otimes D_W)^\top\, s\, \Sigma^{1/2} \zeta, \\
              s_{ij} \propto (1 + i^2 + j^2)^{-\gamma/2}, \quad \Sigma = (1 - \rho) I + \rho\, 1 1^\top

    with the discrete cosine transforms :math:`D`, and :math:`s` scaled to mean square 1. If photographs were
    Gaussian, :math:`\zeta` would be white noise. To an optimiser, the mean square of :math:`\zeta` is the
    simplest of priors, and a step of one size in all coordinates is large where images vary much and small
    where they hardly do.

    Args:
        falloff: :math:`\gamma`; 1 for photographs, 0 treats all frequencies alike.
        correlation: :math:`\rho` of two colour channels, in [0, 1). The default is the mean of those that
            CIFAR-10 has (0.93, 0.91 and 0.83).
        mean: :math:`\mu`, the grey that all images vary about, in [0, 1].
        contrast: :math:`\sigma`, the standard deviation of a pixel, in [0, 1] image units.

    Raises:
        ConfigError: a number is out of range.

    Source: Field 1987, "Relations between the statistics of natural images and the response properties of
    cortical cells"; as coordinates for optimised images, Olah et al. 2017, "Feature visualization".

    Taught in: chapter 3
    """

    falloff: NotNegative = 1.0
    correlation: Below1 = 0.89
    mean: Part = 0.47
    contrast: Positive = 0.25

    def images(self, coordinates: Tensor) -> Tensor:
        """Return the images ``(..., C, H, W)`` in [0, 1] at such coordinates, without clamping."""
        down, across = _transforms(coordinates)
        centred = down.T @ (self._amplitude(coordinates) * self._coloured(coordinates, 0.5)) @ across
        return self.mean + self.contrast * centred

    def coordinates(self, images: Tensor) -> Tensor:
        """Return the coordinates of images ``(..., C, H, W)`` in [0, 1]; undoes `images`."""
        down, across = _transforms(images)
        centred = (images - self.mean) / self.contrast
        return self._coloured(down @ centred @ across.T, -0.5) / self._amplitude(images)

    def prior(self, normalization: Normalization) -> Prior:
        """Return the prior ``(inputs) -> scalar``: the mean square of the coordinates of normalised images.

        White noise in these coordinates has 1, plain grey has 0. It can be one of the priors of
        `invlib.GradientMatching`, with its coordinates or without them.

        Args:
            normalization: how the client encodes images.
        """

        def prior(inputs: Tensor) -> Tensor:
            return self.coordinates(normalization.decode(inputs)).square().mean()

        return prior

    def components(self, normalization: Normalization, like: Tensor) -> Components:
        """Return the numbers of a normalised image that vary independently of one another, were it Gaussian.

        Args:
            normalization: how the client encodes images.
            like: of the shape ``(C, H, W)``, type and device of an image.
        """
        channels = like.shape[-3]
        scale = (normalization.encode(torch.ones_like(like)) - normalization.encode(torch.zeros_like(like)))[
            :, 0, 0
        ]
        mixed = torch.full((channels, channels), self.correlation).to(like).fill_diagonal_(1)
        sizes, colours = torch.linalg.eigh(self.contrast**2 * scale[:, None] * mixed * scale)
        made = Components(
            colours=colours,
            variance=self._amplitude(like).square() * sizes[:, None, None],
            mean=torch.zeros_like(like),
            weight=colours.square().T @ scale.pow(-2),
        )
        grey = normalization.encode(torch.full_like(like, self.mean))
        return replace(made, mean=made.of(grey))

    def _amplitude(self, like: Tensor) -> Tensor:
        i, j = (torch.arange(n, dtype=like.dtype, device=like.device) for n in like.shape[-2:])
        amplitude = torch.pow(i[:, None].square() + j.square() + 1, -self.falloff / 2)
        return amplitude / amplitude.square().mean().sqrt()

    def _coloured(self, images: Tensor, power: float) -> Tensor:
        """Multiply the channels by a power of Σ, which has two eigenvalues: for their mean and the rest."""
        mean = images.mean(-3, keepdim=True)
        shared, rest = 1 + (images.shape[-3] - 1) * self.correlation, 1 - self.correlation
        return math.pow(shared, power) * mean + math.pow(rest, power) * (images - mean)


@dataclass(frozen=True, kw_only=True, eq=False)
class Components:
    """What `NaturalImages.components` returns: an orthonormal basis, and what photographs have in it.

    Args:
        colours: ``(C, C)``, in columns the channels of each component.
        variance: ``(C, H, W)``, of each number.
        mean: ``(C, H, W)``.
        weight: ``(C,)``, what the square of a number adds to the squared error in [0, 1] image units, where
            the errors of all numbers are independent.
    """

    colours: Tensor
    variance: Tensor
    mean: Tensor
    weight: Tensor

    def of(self, inputs: Tensor) -> Tensor:
        """Return the components ``(C, H, W)`` of a normalised image."""
        down, across = _transforms(inputs)
        return torch.einsum("cj,chw->jhw", self.colours, down @ inputs @ across.T)

    def inputs(self, components: Tensor) -> Tensor:
        """Return the normalised image ``(C, H, W)``; undoes `of`."""
        down, across = _transforms(components)
        return down.T @ torch.einsum("cj,jhw->chw", self.colours, components) @ across


@dataclass(frozen=True, kw_only=True)
class Tiles(Checked):
    """Starting images that repeat a small square of noise.

    A pattern is smoother than noise throughout the image, so that fewer evaluations go into smoothing it.

    Args:
        side: height and width of the square in pixels.

    Raises:
        ConfigError: side is out of range.

    Source: Wei et al. 2020, arXiv 2004.10397.
    """

    side: Annotated[int, whole("a whole number from 1 to 4096", lambda n: 1 <= n <= 4096)]

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return images ``(..., H, W)`` in normalised units, every channel with a square of its own."""
        height, width = shape[-2:]
        tile = torch.randn(*shape[:-2], self.side, self.side, generator=generator)
        down, across = (torch.arange(n) % self.side for n in (height, width))
        return tile[..., down, :][..., across]


def _transforms(like: Tensor) -> tuple[Tensor, Tensor]:
    return _cosines(like.shape[-2], like), _cosines(like.shape[-1], like)


def _cosines(n: int, like: Tensor) -> Tensor:
    """Return the orthonormal discrete cosine transform (II) of a length as a matrix."""
    k = torch.arange(n, dtype=like.dtype, device=like.device)
    rows = torch.cos(math.pi / n * (k + 0.5) * k[:, None]) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows
