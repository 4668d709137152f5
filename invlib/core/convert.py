"""Take what other libraries hand over, or refuse it by name: arrays, labels, images, numbers of any type."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invlib.errors import ObservationError

MOST_NUMBERS = 2**34  # in one batch of images: beyond, no machine holds the starting points of a search


def as_tensor(name: str, value: Any) -> Tensor:
    """Return an array or a list of numbers as a dense tensor without a graph.

    Args:
        name: how errors call it.
        value: a tensor (sparse, quantised, made in inference mode), a NumPy array, or a list of numbers.

    Raises:
        ObservationError: it is none of these, or its numbers are complex.
    """
    if not isinstance(value, (Tensor, np.ndarray, np.generic, int, float, list, tuple)):
        raise ObservationError(f"{name} is a {type(value).__name__}; expected a tensor or a NumPy array")
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
    except (TypeError, ValueError) as error:
        raise ObservationError(f"{name} cannot be read as an array of numbers: {error}") from error
    if tensor.is_complex():
        raise ObservationError(f"{name} has complex numbers ({tensor.dtype}); expected real ones")
    if tensor.is_meta:
        raise ObservationError(f"{name} is on the meta device; expected a tensor with numbers")
    tensor = tensor.detach() if tensor.requires_grad else tensor
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(mode=False):
        return tensor.clone()


def as_images(value: Any, like: Tensor | None = None) -> Tensor:
    """Return images ``(N, C, H, W)`` in [0, 1], of bytes or of floating-point numbers.

    Args:
        value: a tensor or an array; bytes are divided by 255.
        like: a tensor whose type and device they get; None keeps their own.

    Raises:
        ObservationError: the shape, the type or the range is another one.
    """
    images = as_tensor("images", value)
    if images.dtype == torch.uint8:
        images = images.to(torch.float32) / 255
    if images.ndim != 4 or not images.is_floating_point() or not images.numel():
        raise ObservationError(
            f"images have shape {tuple(images.shape)} and type {images.dtype}; "
            "expected floating point (N, C, H, W) with N at least 1, or bytes"
        )
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ObservationError(
            f"images lie in [{low:.4g}, {high:.4g}]; expected [0, 1] (do not normalise them)"
        )
    return images if like is None else images.to(like)


def as_tokens(value: Any) -> Tensor | None:
    """Return token sequences int64 ``(N, T)``; None for what is no table of whole numbers, such as images.

    Raises:
        ObservationError: it is no array of numbers, or a table with a side of zero or a negative number.
    """
    tokens = as_tensor("tokens", value)
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        return None
    if not tokens.numel() or int(tokens.min()) < 0:
        lowest = f" and a lowest number of {int(tokens.min())}" if tokens.numel() else ""
        raise ObservationError(
            f"tokens have shape {tuple(tokens.shape)}{lowest}; expected whole numbers from 0 on, (N, T) with "
            "N and T at least 1"
        )
    return tokens.to(torch.int64)


def as_labels(value: Any, *, classes_only: bool, text: bool = False) -> Tensor:
    """Return the targets of a loss: classes int64 ``(N,)``, or whatever else the loss takes, ``(N, ...)``.

    Args:
        value: a tensor, an array or a list; whole numbers of any type, or one-hot rows of classes.
        classes_only: the loss is cross-entropy, which takes classes or probabilities ``(N, classes)``.
        text: they are of token sequences, whose loss may take one class for each place, int64 ``(N, T)``.

    Raises:
        ObservationError: it is no array of numbers with a dimension of images, or not finite.
    """
    labels = as_tensor("labels", value)
    if labels.ndim == 0:
        raise ObservationError(f"labels are the one number {labels.item()}; expected one for each image")
    whole = not labels.is_floating_point()
    if text and whole and not classes_only and labels.dtype != torch.bool:
        return labels.to(torch.int64)
    if labels.ndim == 2 and labels.shape[1] == 1 and whole:
        labels = labels[:, 0]
    if labels.ndim == 1 and whole and labels.dtype != torch.bool:
        return labels.to(torch.int64)
    if not torch.isfinite(labels).all():
        raise ObservationError("labels have NaN or infinite numbers; expected finite ones")
    one_hot = labels.ndim == 2 and bool(((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all())
    if classes_only and one_hot:
        return labels.to(torch.int8).argmax(1)
    if classes_only and labels.ndim == 1:
        raise ObservationError(
            f"labels have type {labels.dtype}; expected int64 (N,), "
            "or loss=..., the loss that takes such targets"
        )
    if classes_only and not _probabilities(labels):
        raise ObservationError(
            f"labels of shape {tuple(labels.shape)} are neither classes nor probabilities that add up to 1; "
            "expected int64 (N,), or loss=..., the loss that takes such targets"
        )
    return labels if labels.is_floating_point() else labels.to(torch.float32)


def _probabilities(labels: Tensor) -> bool:
    if labels.ndim != 2:
        return False
    totals = labels.double().sum(1)
    return bool((labels >= 0).all()) and torch.allclose(totals, torch.ones_like(totals), atol=1e-3)


def as_shape(value: Any, num_images: Any) -> tuple[int, tuple[int, ...]]:
    """Return the number of images and the shape ``(C, H, W)`` of one, or ``(T,)`` of a token sequence.

    Raises:
        ObservationError: they are no positive whole numbers, or so large that no machine holds the images.
    """
    sizes: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    text = len(sizes) == 1 and isinstance(value, (list, tuple))
    if not (text or len(sizes) == 3) or not all(_whole(n) and n >= 1 for n in sizes):
        raise ObservationError(
            f"image_shape is {value!r}; expected three whole numbers (C, H, W), or (T,) for token sequences"
        )
    if not _whole(num_images) or num_images < 1:
        raise ObservationError(f"num_images is {num_images!r}; expected a whole number of at least 1")
    shape = tuple(int(n) for n in sizes)
    if (total := int(num_images) * math.prod(shape)) > MOST_NUMBERS:
        raise ObservationError(
            f"num_images {num_images} of image_shape {value!r} are {total:.1e} numbers; "
            f"expected at most {MOST_NUMBERS:.1e}"
        )
    return int(num_images), shape


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
