"""How a client encodes images in [0, 1], and the usual numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invlib.errors import ConfigError, DataError
from invlib.settings import Checked, Finite, Positive, shown


@dataclass(frozen=True, kw_only=True)
class Normalization(Checked):
    """The per-channel mean and standard deviation that a client applies to images in [0, 1].

    Args:
        mean: one number per channel, in [0, 1] image units.
        std: one positive number per channel, in [0, 1] image units.

    Raises:
        ConfigError: mean and std differ in length, or a std is not positive.

    Example:
        >>> UNIT.encode(torch.full((1, 1, 2, 2), 0.5)).mean().item()
        0.5
    """

    mean: tuple[Finite, ...]
    std: tuple[Positive, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) != len(self.std) or not self.mean:
            raise ConfigError(
                f"Normalization mean has {len(self.mean)} channels and std has {len(self.std)}; "
                "expected the same number, at least one"
            )

    @classmethod
    def of(cls, value: Any) -> Normalization:
        """Return a normalization that is given as one, or as a pair of tuples, lists, arrays or tensors.

        Raises:
            ConfigError: it is neither, or its numbers are out of range.
        """
        if isinstance(value, cls):
            return value
        try:
            mean, std = (part.tolist() if hasattr(part, "tolist") else part for part in value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"normalization is {shown(value)}; expected a Normalization such as invlib.CIFAR10, or a "
                "pair of tuples, mean and std"
            ) from error
        return cls(mean=mean, std=std)

    @classmethod
    def from_card(cls, card: Mapping[str, Any], default: Normalization | None = None) -> Normalization:
        """Return what a model card, or the header of a saved observation, has as ``"normalization"``.

        Args:
            card: as read from JSON.
            default: taken where the card has none.

        Raises:
            DataError: the card has none, and there is no default.
        """
        if "normalization" in card:
            return cls(**card["normalization"])
        if default is None:
            raise DataError("no 'normalization' in the card; expected one with 'mean' and 'std'")
        return default

    def _column(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        if len(values) not in (1, like.shape[-3]):
            raise ConfigError(
                f"normalization has {len(values)} channels, the images have {like.shape[-3]} "
                f"(shape {tuple(like.shape)}); expected the same number, or one for all"
            )
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Return ``(images - mean) / std``; images ``(..., C, H, W)`` in [0, 1]."""
        return (images - self._column(self.mean, images)) / self._column(self.std, images)

    def decode(self, inputs: Tensor) -> Tensor:
        """Return ``inputs * std + mean``, the inverse of `encode`; no clamping."""
        return inputs * self._column(self.std, inputs) + self._column(self.mean, inputs)

    def box(self, *, dtype: torch.dtype = torch.float32, device: Any = None) -> tuple[Tensor, Tensor]:
        """Return the normalised images of black and white, each ``(1, C, 1, 1)``."""
        black = torch.zeros(1, len(self.mean), 1, 1, dtype=dtype, device=device)
        return self.encode(black), self.encode(torch.ones_like(black))


UNIT = Normalization(mean=(0.0,), std=(1.0,))
CIFAR10 = Normalization(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
CIFAR100 = Normalization(mean=(0.5071, 0.4866, 0.4409), std=(0.2673, 0.2564, 0.2762))
MNIST = Normalization(mean=(0.1307,), std=(0.3081,))
FASHION_MNIST = Normalization(mean=(0.2860,), std=(0.3530,))
IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# By the names that `invlib.data.load` knows.
NORMALIZATIONS = {
    "CIFAR10": CIFAR10,
    "CIFAR100": CIFAR100,
    "MNIST": MNIST,
    "FashionMNIST": FASHION_MNIST,
    "ImageNet": IMAGENET,
}
