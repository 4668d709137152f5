"""The private images of an experiment, and the candidates that a reconstruction has to tell them from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from invlib import data
from invlib.core.normalization import CIFAR10, IMAGENET, NORMALIZATIONS, Normalization
from invlib.errors import ConfigError

CANDIDATES = 100
# Networks are tuned on the first hundred training images; reports are made elsewhere.
_FIRST = {"CIFAR10": 1000, "CIFAR100": 1000}
# The labels of these are numbers, not classes: two images with one label have nothing in common.
_NO_CLASSES = ("patches32", "photos32", "photos64", "photos224")


def choose(name: str, split: str) -> str:
    """Return the data set that a name stands for: ``"auto"`` is CIFAR10 where it is on this disk.

    Raises:
        UnknownNameError: there is no data set of that name.
        DataError: a file is there but corrupt.
    """
    if name == "auto":
        return data.default(split=split, indices=[0])[2]
    if name not in data.sample_names():
        data.slug(name)
    return name


def slug(dataset: str) -> str:
    """Return the short name that trained weights for a data set carry; samples take those of their kind."""
    if dataset == "fashion":
        return data.slug("FashionMNIST")
    return data.slug(dataset) if dataset not in data.sample_names() else data.slug("CIFAR10")


def normalization(dataset: str) -> Normalization:
    """Return how a client encodes the images of a data set where no model card says otherwise."""
    if dataset == "fashion":
        return NORMALIZATIONS["FashionMNIST"]
    return NORMALIZATIONS.get(dataset, IMAGENET if dataset == "photos224" else CIFAR10)


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Neighbouring images of a data set, whole hundreds of them.

    Args:
        name: the data set.
        split: ``"train"`` or ``"test"``.
        start: the number of the first image in the data set.
        images: ``(N, C, H, W)`` in [0, 1].
        labels: int64 ``(N,)``.
    """

    name: str
    split: str
    start: int
    images: Tensor
    labels: Tensor

    def take(self, rows: range) -> tuple[Tensor, Tensor]:
        """Return private images by their numbers in the data set, and their labels."""
        inside = slice(rows.start - self.start, rows.stop - self.start)
        return self.images[inside], self.labels[inside]

    def candidates(self, row: int) -> tuple[Tensor, int]:
        """Return the images of the same hundred as an image, itself among them, and its index."""
        start = row // CANDIDATES * CANDIDATES - self.start
        return self.images[start : start + CANDIDATES], row - self.start - start

    def others(self, row: int) -> tuple[Tensor, Tensor]:
        """Return the other images of the same hundred, and those of them that are of its class."""
        images, own = self.candidates(row)
        begin = row - self.start - own
        labels = self.labels[begin : begin + CANDIDATES]
        other = torch.arange(len(images), device=images.device) != own
        same = other & (labels == labels[own]) & (self.name not in _NO_CLASSES)
        return images[other], images[same]


def load(name: str, split: str, first: int | None, count: int, device: torch.device) -> tuple[Gallery, int]:
    """Return a gallery of the images from a number on, and that number.

    Args:
        name: a data set or an embedded sample.
        split: ``"train"`` or ``"test"``.
        first: the first private image; None takes 1000 where the data set is CIFAR, else 0.
        count: how many private images there are.
        device: where the images are wanted.

    Raises:
        ConfigError: the data set has fewer images.
        DataError: the data set is nowhere to be had.
    """
    first = _FIRST.get(name, 0) if first is None else first
    if first < 0:
        raise ConfigError(f"--first is {first}; expected at least 0")
    if name in data.sample_names():
        start = 0
        images, labels = data.samples(name)
        if first + count > len(images):
            raise ConfigError(
                f"images {first} to {first + count - 1} are wanted, but {name} has {len(images)}; "
                "expected fewer --images, or CIFAR10 on this disk"
            )
    else:
        start = first // CANDIDATES * CANDIDATES
        stop = -(-(first + count) // CANDIDATES) * CANDIDATES
        try:
            images, labels = data.load(name, split=split, indices=range(start, stop))
        except ConfigError as error:
            raise ConfigError(
                f"images {first} to {first + count - 1} are wanted (--first, --images) and those of the same "
                f"hundreds to tell them from, {start} to {stop - 1}: {error}"
            ) from error
    here = Gallery(name=name, split=split, start=start, images=images.to(device), labels=labels.to(device))
    return here, first


def classes(name: str) -> int:
    """Return how many classes a network for a data set has; 10 for images whose labels are mere numbers."""
    return 10 if name in _NO_CLASSES else len(data.class_names(name))
