"""All measures of a reconstruction at once, its images in the order of the truth."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from invlib.core.reconstruction import Reconstruction
from invlib.errors import ConfigError
from invlib.metrics.quality import SSIM_SIDE, mse, originals, psnr, ssim, unit_images

_SHIFT = 8  # pixels: trained networks give copies moved by the product of their strides
_MUCH = 3.0  # dB, from which on another PSNR is worth a line
_EXACT = 60.0  # dB, beyond which no difference can be seen and no cause of it is worth a line
_LINES = 3  # of each kind


def matching_order(images: Tensor, truth: Tensor) -> Tensor:
    """Return which reconstruction belongs to each true image, by the assignment of least squared error.

    The order of a batch leaves no trace in its mean gradient, so it is matched before comparing.

    Args:
        images: ``(M, C, H, W)`` in [0, 1], of as many as were found.
        truth: ``(N, C, H, W)``, no fewer.

    Returns:
        int64 ``(N,)``: ``images[order]`` is in the truth's order. Where M is under N, -1 for each true image
        that has none; ``images[order[order >= 0]]`` is in the order of the others.

    Raises:
        ConfigError: the shapes do not fit, or the truth does not lie in [0, 1].

    Taught in: chapter 4
    """
    given, expected = (tuple(getattr(part, "shape", ())) for part in (images, truth))
    if given[1:] != expected[1:] or given[:1] > expected[:1]:
        raise ConfigError(
            f"images have shape {given} and the truth {expected}; expected the same (N, C, H, W), or fewer"
        )
    images, truth = unit_images(images, "images").detach(), originals(truth).detach()
    cost = torch.cdist(truth.to(images.device).flatten(1), images.flatten(1)).square()
    # A broken image is as far from every true one as can be; a larger number would drown the others.
    furthest = 4.0 * truth[0].numel()
    finite = torch.nan_to_num(cost, nan=furthest, posinf=furthest)
    matched, by = (torch.from_numpy(places) for places in linear_sum_assignment(finite.cpu().numpy()))
    order = torch.full((len(truth),), -1)
    order[matched] = by
    return order.to(images.device)


@dataclass(frozen=True, kw_only=True)
class Report:
    """How close a reconstruction is to the truth, beside what no attack at all would give.

    Args:
        images: the reconstructed images ``(N, C, H, W)``, like all that follows in the truth's order; where
            an attack found M of the N, these M, and like all that follows but ``order``.
        mse: one number for each image.
        psnr: likewise, in dB.
        ssim: likewise; empty for images under 11 pixels a side.
        order: which image of the reconstruction was matched to each of the N true ones; -1: none was found.
        labels_right: how many of the labels are right, as a multiset, of soft ones the likeliest class; None
            where there are none.
        num_images: how many true images there are.
        grey_psnr: the PSNR of a plain mid-grey image against each true one.
        mean_image_psnr: the PSNR of the mean of the true images (for one image, of its mean colour).
        shifts: by how many pixels (down, right) each image lies off its original where the two agree best, at
            most 8 and a quarter of the side; ``(0, 0)`` where they agree best in place.
        aligned_psnr: the PSNR there, of the pixels that both have; beside `psnr`, never in its place.
        matched_psnr: the PSNR once each channel has the mean and the standard deviation (contrast) of the
            original's; likewise. Far above `psnr`, the image is right and its brightness is not, as after a
            wrong normalisation.
    """

    images: Tensor = field(repr=False, compare=False)
    mse: tuple[float, ...]
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    order: tuple[int, ...]
    labels_right: int | None
    num_images: int
    grey_psnr: tuple[float, ...]
    mean_image_psnr: tuple[float, ...]
    shifts: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    aligned_psnr: tuple[float, ...] = field(default=(), repr=False)
    matched_psnr: tuple[float, ...] = field(default=(), repr=False)

    @property
    def mean_psnr(self) -> float:
        """The mean of `psnr` over the images, in dB."""
        return _mean(self.psnr)

    @property
    def mean_mse(self) -> float:
        """The mean of `mse` over the images."""
        return _mean(self.mse)

    @property
    def mean_ssim(self) -> float:
        """The mean of `ssim` over the images; NaN where their sides are under 11 pixels."""
        return _mean(self.ssim)

    def _far_above(self, values: tuple[float, ...]) -> list[int]:
        """Return the images whose PSNR of another kind tells what the plain one and the floors do not."""
        plain = zip(self.psnr, self.grey_psnr, self.mean_image_psnr, strict=True)
        return [
            k
            for k, (value, known) in enumerate(zip(values, plain, strict=False))
            if value > max(known) + _MUCH and max(known) < _EXACT
        ]

    def __str__(self) -> str:
        found = self.num_images - self.order.count(-1)
        some = [f"found {found} of {self.num_images} images"] if found < self.num_images else []
        if not found:
            return f"{some[0]}: there is nothing to compare"
        lines = [f"PSNR {self.mean_psnr:6.2f} dB   MSE {self.mean_mse:.2e}"]
        if self.ssim:
            lines[0] += f"   SSIM {self.mean_ssim:.3f}"
        grey, mean = _mean(self.grey_psnr), _mean(self.mean_image_psnr)
        lines.append(f"floors: grey image {grey:.2f} dB, mean image {mean:.2f} dB")
        if self.labels_right is not None:
            lines.append(f"labels right: {self.labels_right} of {found}")
        moved = [
            f"image {k} lies {_way(*self.shifts[k])}: {self.aligned_psnr[k]:.2f} dB where it is moved back"
            for k in self._far_above(self.aligned_psnr)
        ]
        pale = [
            f"image {k} is off in brightness or contrast: {self.matched_psnr[k]:.2f} dB with the original's"
            for k in self._far_above(self.matched_psnr)
        ]
        for said in (moved, pale):
            lines += said if len(said) <= _LINES else [*said[:_LINES], f"… and {len(said) - _LINES} more"]
        return "\n".join(some + lines)


def evaluate(reconstruction: Reconstruction, truth: Tensor, labels: Tensor | None = None) -> Report:
    """Compare a reconstruction with the truth, after matching the order of the batch.

    A result that is the original but for a shift of a few pixels, or but for brightness and contrast, is
    found out: the report has the PSNR without either beside the plain one. Of a result with fewer images than
    the truth, such as that of `invlib.exact_batch`, it says how many were found, and how well those.

    Args:
        reconstruction: what an attack returned.
        truth: the private images ``(N, C, H, W)`` in [0, 1], or bytes, which are divided by 255; a tensor
            or a NumPy array.
        labels: the private labels, integers ``(N,)``.

    Raises:
        ConfigError: the shapes do not fit, the truth does not lie in [0, 1], or labels are not N integers.

    Taught in: chapter 2
    """
    if not isinstance(reconstruction, Reconstruction):
        raise ConfigError(
            f"reconstruction is a {type(reconstruction).__name__}; expected what an attack returned "
            "(invlib.metrics.psnr compares images)"
        )
    if reconstruction.tokens is not None:
        raise ConfigError(
            "the reconstruction is of text; expected images (compare its tokens with the truth)"
        )
    images = reconstruction.images.detach()
    order = matching_order(images, truth) if len(images) else None
    truth = originals(truth).detach().to(images.device)
    given = None if labels is None else _whole(labels, len(truth))
    if order is None:
        none: dict[str, Any] = dict.fromkeys(("mse", "psnr", "ssim", "grey_psnr", "mean_image_psnr"), ())
        nowhere = (-1,) * len(truth)
        return Report(images=images, order=nowhere, labels_right=None, num_images=len(truth), **none)
    found = order >= 0
    images = images[order[found]]
    right = None
    if given is not None and reconstruction.labels is not None:
        known = [label for label, there in zip(given, found.tolist(), strict=True) if there]
        named = reconstruction.labels  # of soft labels, the class of the largest probability
        named = named.argmax(1) if named.is_floating_point() else named
        right = (Counter(known) & Counter(named.tolist())).total()
    mean = truth.mean(0, keepdim=True) if len(truth) > 1 else truth.mean((2, 3), keepdim=True)
    num_images, truth = len(truth), truth[found]
    plain = psnr(images, truth)
    shifts, aligned = _aligned(images.double(), truth)
    grey = torch.full_like(truth, 0.5)
    return Report(
        images=images,
        mse=_floats(mse(images, truth)),
        psnr=_floats(plain),
        ssim=_floats(ssim(images, truth)) if min(truth.shape[2:]) >= SSIM_SIDE else (),
        order=tuple(order.tolist()),
        labels_right=right,
        num_images=num_images,
        grey_psnr=_floats(psnr(grey, truth)),
        mean_image_psnr=_floats(psnr(mean.expand_as(truth), truth)),
        shifts=shifts,
        aligned_psnr=_floats(aligned),
        matched_psnr=_floats(psnr(_matched(images.double(), truth), truth)),
    )


def _whole(labels: Any, count: int) -> list[int]:
    """Return labels as whole numbers, where they are as many as there are images."""
    try:
        array = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"labels are a {type(labels).__name__}; expected {count} integers") from error
    if array.is_floating_point() or array.is_complex() or tuple(array.shape) != (count,):
        raise ConfigError(
            f"labels have shape {tuple(array.shape)} and type {array.dtype}; expected integers ({count},)"
        )
    return [int(label) for label in array.tolist()]


def _aligned(images: Tensor, truth: Tensor) -> tuple[tuple[tuple[int, int], ...], Tensor]:
    """Return the shift (down, right) where each image agrees best with its original, and the PSNR there."""
    height, width = truth.shape[2:]
    tall, wide = (min(_SHIFT, side // 4) for side in (height, width))
    # the nearest first: of several that agree as well, argmin takes the first
    places = sorted(
        ((down, right) for down in range(-tall, tall + 1) for right in range(-wide, wide + 1)),
        key=lambda place: abs(place[0]) + abs(place[1]),
    )
    errors = torch.stack(
        [
            (
                images[:, :, max(d, 0) : height + min(d, 0), max(r, 0) : width + min(r, 0)]
                - truth[:, :, max(-d, 0) : height + min(-d, 0), max(-r, 0) : width + min(-r, 0)]
            )
            .square()
            .mean((1, 2, 3))
            for d, r in places
        ]
    )
    best = errors.argmin(0)
    return tuple(places[k] for k in best.tolist()), -10 * errors.gather(0, best[None])[0].log10()


def _matched(images: Tensor, truth: Tensor) -> Tensor:
    """Return images with each channel's mean and standard deviation as in the truth."""
    centred = images - images.mean((2, 3), keepdim=True)
    spread, wanted = (x.std((2, 3), keepdim=True, correction=0) for x in (images, truth))
    scale = torch.where(spread > 1e-9, wanted / spread.clamp_min(1e-9), 0.0)
    return centred * scale + truth.mean((2, 3), keepdim=True)


def _way(down: int, right: int) -> str:
    """Say a shift in words, such as ``4 pixels too low and 1 pixel too far left``."""
    parts = [
        f"{abs(n)} pixel{'s' if abs(n) > 1 else ''} {words[n < 0]}"
        for n, words in ((down, ("too low", "too high")), (right, ("too far right", "too far left")))
        if n
    ]
    return " and ".join(parts)


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values) if values else math.nan
