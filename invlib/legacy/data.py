"""The loaders of 2020, over what `invlib.data` finds."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from invlib import data
from invlib.core.normalization import UNIT, Normalization
from invlib.data.files import list_images, read_images, torchvision_set
from invlib.errors import UnknownNameError
from invlib.legacy import consts
from invlib.legacy.training import Strategy

# name: (name in `invlib.data`, sides in pixels, pixels that augmentation adds on each side)
_SETS = {"CIFAR10": ("CIFAR10", 32, 4), "CIFAR100": ("CIFAR100", 32, 4)}
_SETS |= {"MNIST": ("MNIST", 28, 2), "MNIST_GRAY": ("MNIST", 28, 2), "ImageNet": ("ImageNet", 224, 0)}


class Classification:
    """Half the mean cross-entropy, as in 2020, and the accuracy; asked nothing, each says its name."""

    def __call__(self, x: Tensor | None = None, y: Tensor | None = None) -> tuple[Any, ...]:
        """Return the loss of logits ``(N, K)`` and labels ``(N,)``, its name and its format."""
        what = ("CrossEntropy", "1.5f")
        return what if x is None or y is None else (0.5 * F.cross_entropy(x, y), *what)

    def metric(self, x: Tensor | None = None, y: Tensor | None = None) -> tuple[Any, ...]:
        """Return the share of right predictions, its name and its format."""
        what = ("Accuracy", "6.2%")
        return what if x is None or y is None else ((x.detach().argmax(1) == y).float().mean(), *what)


class Images(Dataset[tuple[Tensor, int]]):
    """A split of a data set, ``"train"`` or ``"test"``, and its ``classes``; ImageNet is read image by image.

    ``augment`` shifts images ``(C, H, W)`` and mirrors half of them, by torch's default generator.
    """

    def __init__(self, name: str, split: str, root: Path | None, *, normalize: bool, augment: bool) -> None:
        own, self.size, self.margin = _SETS[name]
        self.augment, self.files = augment, list[tuple[Any, int]]()
        slug = data.slug(own)
        mean, std = (tuple(getattr(consts, f"{slug}_{what}")) for what in ("mean", "std"))
        self.normalization = Normalization(mean=mean, std=std) if normalize else UNIT
        self.classes = data.class_names(own)
        # Of ImageNet one image, which says what is wrong where there is none.
        one = [0] if own == "ImageNet" else None
        self.images, self.labels = data.load(own, split=split, root=root, indices=one)
        if one:
            folder = (place := root or Path(".")) / slug / split
            kept = list_images(folder) if folder.is_dir() else None
            self.files = kept or torchvision_set(own, split, place, download=False).samples

    def __len__(self) -> int:
        return len(self.files or self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image and its label."""
        index = range(len(self))[index]
        if self.files:
            image, label = read_images(self.files, 256, [index], "ImageNet")
        else:
            image, label = self.images[index : index + 1], self.labels[index]
        margin = self.margin if self.augment else 0
        image = F.pad(image, (margin,) * 4)
        spare = image.shape[-1] - self.size
        top, left = torch.randint(spare + 1, (2,)).tolist() if self.augment else (spare // 2, spare // 2)
        image = image[..., top : top + self.size, left : left + self.size]
        if self.augment and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return self.normalization.encode(image)[0], int(label)


def construct_dataloaders(
    dataset: str,
    defs: Strategy,
    data_path: str | os.PathLike[str] | None = None,
    shuffle: bool = True,
    normalize: bool = True,
) -> tuple[Classification, DataLoader[tuple[Tensor, int]], DataLoader[tuple[Tensor, int]]]:
    """Return the loss, the training loader and the validation loader of a data set.

    Args:
        dataset: ``"CIFAR10"``, ``"CIFAR100"``, ``"MNIST"``, ``"MNIST_GRAY"`` (the same) or ``"ImageNet"``.
        defs: its ``batch_size`` and ``augmentations`` count.
        data_path: where `invlib.data.load` looks; None is ``INVLIB_DATA``, else ``~/data``, else its cache.
        shuffle: mix the training images.
        normalize: give images normalised by `consts`; else in [0, 1].

    Raises:
        UnknownNameError: there is no such data set.
        DataError: it is neither on the disk nor can it be downloaded; the message says what to do.
    """
    if dataset not in _SETS:
        why = " (it is for networks that raise the resolution, which are not here)"
        why = why if dataset.startswith("BSDS") else ""
        raise UnknownNameError(f"no data set {dataset!r}{why}; known: {', '.join(_SETS)}")
    path = Path(data_path or os.environ.get("INVLIB_DATA") or "~/data").expanduser()
    root = path if data_path or path.is_dir() else None
    train = Images(dataset, "train", root, normalize=normalize, augment=defs.augmentations)
    valid = Images(dataset, "test", root, normalize=normalize, augment=False)
    size = min(defs.batch_size, len(train))
    loader = DataLoader(train, batch_size=size, shuffle=shuffle, drop_last=True)
    return Classification(), loader, DataLoader(valid, batch_size=size)
