"""Transforms after which a number that was sent stands for an interval: left out, rounded, its sign alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from invlib.defenses.transforms import Box, Named, Transform
from invlib.settings import Factor, whole

_BITS = 24  # from here on steps are finer than the rounding of single precision


@dataclass(frozen=True, repr=False)
class TopK(Transform):
    """Send the largest numbers of an update alone, by magnitude among all its tensors; the others are zero.

    Args:
        share: how many are sent, as a share of all, in (0, 1].

    Raises:
        ConfigError: the share is out of range.

    Taught in: chapter 7
    """

    share: Factor
    called: ClassVar[str] = "top-k"

    @property
    def coarse(self) -> bool:
        """Whether some numbers are not sent."""
        return self.share < 1

    def simulate(self, update: Named) -> dict[str, Tensor]:
        """Return the update with zeros for the numbers that are not sent."""
        if not self.coarse:
            return dict(update)
        flat = torch.cat([u.reshape(-1) for u in update.values()])
        kept = flat.abs().topk(max(1, round(self.share * flat.numel())), sorted=False).indices
        mask = torch.zeros_like(flat).scatter(0, kept, 1.0)
        parts = (flat * mask).split([u.numel() for u in update.values()])
        return {name: part.view_as(u) for (name, u), part in zip(update.items(), parts, strict=True)}

    def before(self, box: Box) -> Box:
        """Return the intervals: numbers that were not sent were no larger than the smallest that was."""
        if not self.coarse:
            return box
        kept = [~((low <= 0) & (high >= 0) & low.isfinite() & high.isfinite()) for low, high in box]
        least = torch.stack(
            [
                torch.where(k, torch.maximum(low.abs(), high.abs()), torch.inf).min()
                for k, (low, high) in zip(kept, box, strict=True)
                if low.numel()
            ]
        ).min()
        return [
            (
                torch.where(k, low, torch.minimum(low, -least)),
                torch.where(k, high, torch.maximum(high, least)),
            )
            for k, (low, high) in zip(kept, box, strict=True)
        ]


@dataclass(frozen=True, repr=False)
class Sign(Transform):
    """Send the signs of an update's numbers alone: -1, 0 or 1.

    Taught in: chapter 7
    """

    called: ClassVar[str] = "sign"

    @property
    def coarse(self) -> bool:
        """Always."""
        return True

    def apply(self, update: Named, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the signs."""
        return {name: u.sign() for name, u in update.items()}

    def before(self, box: Box) -> Box:
        """Return all numbers of the sign."""
        return [
            (torch.where(low < 0, -torch.inf, low * 0), torch.where(high > 0, torch.inf, high * 0))
            for low, high in box
        ]


@dataclass(frozen=True, repr=False)
class Quantize(Transform):
    r"""Round the numbers of each tensor to the nearest of :math:`2^b - 1` evenly spaced levels.

    They reach from minus the largest magnitude in the tensor to the largest, which is sent beside them.

    Args:
        bits: :math:`b`, from 2 to 32.

    Raises:
        ConfigError: it is out of range.

    Taught in: chapter 7
    """

    bits: Annotated[int, whole("a whole number from 2 to 32", lambda n: 2 <= n <= 32)] = 8
    called: ClassVar[str] = "quantisation"

    @property
    def coarse(self) -> bool:
        """Whether its steps are wider than the rounding of single precision."""
        return self.bits < _BITS

    @property
    def words(self) -> str:
        """What it is, in a few words."""
        return f"{self.called} to {self.bits} bits"

    @property
    def _levels(self) -> int:
        return (1 << self.bits - 1) - 1  # on each side of zero

    def apply(self, update: Named, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the rounded numbers."""
        return {name: self._rounded(u) if u.numel() else u for name, u in update.items()}

    def _rounded(self, update: Tensor) -> Tensor:
        largest = update.abs().max().double()
        step = largest / self._levels
        return (torch.where(step > 0, update / step, 0).round() * step).to(update)

    def before(self, box: Box) -> Box:
        """Return half a step to both sides."""
        if not self.coarse:
            return box
        halves = [
            torch.maximum(low.abs(), high.abs()).max() / self._levels / 2 if low.numel() else 0.0
            for low, high in box
        ]
        return [(low - half, high + half) for half, (low, high) in zip(halves, box, strict=True)]


@dataclass(frozen=True, repr=False)
class Transport(Transform):
    """Send an update in a type of half precision; the server reads it in the model's own.

    Args:
        dtype: ``"bfloat16"`` or ``"float16"``.

    Raises:
        ConfigError: it is another one.
    """

    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    called: ClassVar[str] = "transport in"

    @property
    def coarse(self) -> bool:
        """Always."""
        return True

    def apply(self, update: Named, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the rounded numbers, in the type that the update had."""
        return {name: u.to(getattr(torch, self.dtype)).to(u) for name, u in update.items()}

    def before(self, box: Box) -> Box:
        """Return half a step to both sides of each number."""
        of = torch.finfo(getattr(torch, self.dtype))

        def half(end: Tensor) -> Tensor:
            return end.abs() * of.eps / 2 + of.smallest_normal * of.eps / 2

        return [(low - half(low), high + half(high)) for low, high in box]
