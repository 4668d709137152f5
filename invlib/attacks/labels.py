"""Label inference: which classes a client trained on, read off the update before any image is sought."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.core.network import classifier, record_layers, trainable_parameters
from invlib.core.observation import Observation
from invlib.errors import RecoveryError
from invlib.federated import FedAvg


@dataclass(frozen=True, kw_only=True)
class LabelInference:
    """Labels read off an update.

    Args:
        labels: int64 ``(N,)``, ascending: their order within the batch leaves no trace in a mean gradient.
        counts: int64 ``(classes,)``, how many images of each class.
        method: which rule gave them, in words.
    """

    labels: Tensor
    counts: Tensor
    method: str


def infer(model: nn.Module, observation: Observation, *, samples: int = 64) -> LabelInference:
    r"""Infer the labels of the client's images from the gradient of the last layer.

    With cross-entropy the bias gradient of class :math:`c` is the mean of :math:`p_c - [y = c]`, so it
    is negative only for classes in the batch. For one image its smallest entry is the label. For a batch
    of :math:`N` images the counts are about :math:`N(\bar p_c - g_c)`; the mean prediction
    :math:`\bar p` is estimated by running the model on random images. A weight update is turned into a mean
    gradient first, which also mends its opposite sign.

    Without a bias the weight gradient has to say it. For one image, row :math:`c` is
    :math:`(p_c - [y = c])\, a` with the features :math:`a` of unknown sign. As the factors add up to zero,
    the row of the label has the opposite direction of all others and the length of their sum, whatever
    :math:`a` is. Where only two rows differ from zero, as with two classes, they are each other's negative
    and either may be the label's: the one opposed to the mean features of random images is taken, which is
    right for features that cannot be negative (or positive), and a guess for others. For a batch, row sums
    take the place of the bias gradient, divided by the mean sum of such features.

    Args:
        model: the model that the client received.
        observation: what the server saw.
        samples: how many random images estimate the mean prediction of a batch.

    Returns:
        The labels (exact for one image, but for the two rows above; an estimate for batches).

    Raises:
        RecoveryError: the model has no fully connected layer, the update lacks it, or its gradient is zero.

    Source: Zhao et al. 2020 (iDLG), arXiv 2001.02610, for one image; Wainakh et al. 2022 (LLG),
    arXiv 2105.09369, for batches.

    Taught in: chapter 1
    """
    weight, bias = classifier(model)
    name = weight if bias is None or bias not in observation.update else bias
    if name not in observation.update:
        raise RecoveryError(
            f"the update lacks {name!r}, the last fully connected layer; give the labels instead"
        )
    gradient = observation.protocol.mean_gradient(observation.update[name], observation.num_images)
    if not gradient.any():
        raise RecoveryError(f"the gradient of {name!r} is all zero; it says nothing about the labels")
    if observation.num_images == 1:
        if gradient.ndim == 1:
            label, method = int(gradient.argmin()), "smallest entry of the bias gradient"
        else:
            label, method = _opposed_row(model, observation, gradient, samples)
        labels = torch.tensor([label], device=gradient.device)
        counts = torch.bincount(labels, minlength=len(gradient))
        return LabelInference(labels=labels, counts=counts, method=method)
    per_class = gradient if gradient.ndim == 1 else gradient.sum(1)
    source = "bias gradient" if gradient.ndim == 1 else "row sums of the weight gradient"
    predictions, features = _typical_output(model, observation, samples)
    scale = features.sum() if gradient.ndim == 2 else features.new_ones(())
    expected = observation.num_images * (predictions - per_class / scale)
    counts = _whole_counts(expected, present=per_class * scale.sign() < 0, total=observation.num_images)
    labels = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return LabelInference(labels=labels, counts=counts, method=f"counts from the {source}")


def _opposed_row(
    model: nn.Module, observation: Observation, gradient: Tensor, samples: int
) -> tuple[int, str]:
    """Return which row of one image's weight gradient is opposed to the others, and by what it was chosen."""
    rows = gradient.double() / gradient.abs().max()
    along = rows @ rows[rows.square().sum(1).argmax()]
    first, second = int(along.argmax()), int(along.argmin())
    # The factors of all rows add up to zero. Where these two differ by little more than rounding, the sum of
    # the others, which is the same difference, says it without cancellation.
    longer = along[first] + along[second]
    if longer.abs() <= 1e-3 * along[first]:
        others = torch.ones_like(along)
        others[[first, second]] = 0
        longer = -(along * others).sum()
    if longer != 0:
        return first if longer > 0 else second, "row of the weight gradient that is opposed to all others"
    _, features = _typical_output(model, observation, samples)
    opposed = second if rows[first] @ features.to(rows) > 0 else first
    return opposed, "row of the weight gradient that is opposed to the features of random images"


def _typical_output(model: nn.Module, observation: Observation, samples: int) -> tuple[Tensor, Tensor]:
    """Return the mean prediction and the mean inputs ``(D,)`` of the last layer on random images.

    The images are noise at several scales, since predictions depend on how smooth an image is. A client
    that trains for some steps predicts with weights that move, from the ones sent to it to the ones it
    sends back; the server knows both ends and takes the mean.
    """
    params = trainable_parameters(model)
    some = next(iter(params.values()))
    images = _noise_images(samples, observation.image_shape).to(some)
    inputs = observation.normalization.encode(images)
    ends = [params]
    if isinstance(observation.protocol, FedAvg):
        ends.append({name: p + observation.update[name].to(p) for name, p in params.items()})
    name = classifier(model)[0].removesuffix("weight").removesuffix(".")
    predictions, features = [], []
    for end in ends:
        logits, calls = record_layers(
            model, inputs, nn.Linear, params=end, training=observation.training_mode
        )
        predictions.append(logits.softmax(-1))
        features += [call.given.flatten(0, -2) for call in calls if call.name == name]
    return torch.cat(predictions).mean(0), torch.cat(features).mean(0)


def _noise_images(samples: int, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    parts = []
    for coarse in (1, 4, 8):
        count = -(-samples // 3)
        size = (max(1, min(coarse, height)), max(1, min(coarse, width)))
        noise = torch.rand(count, channels, *size, generator=generator)
        parts.append(F.interpolate(noise, (height, width), mode="bilinear"))
    return torch.cat(parts)


def _whole_counts(expected: Tensor, *, present: Tensor, total: int) -> Tensor:
    """Round expected counts to whole numbers with the given total, at least one where a class is present."""
    counts = expected.clamp_min(0).floor().long()
    counts = torch.where(present, counts.clamp_min(1), counts)
    # Single images are given to the class that is furthest short of its expectation, or taken from the
    # one furthest above it, until the total is right; a present class keeps its last image.
    while (short := total - int(counts.sum())) != 0:
        gap = expected - counts
        if short > 0:
            counts[gap.argmax()] += 1
        else:
            can_give = counts > (present.long() if int(present.sum()) <= total else 0)
            counts[gap.masked_fill(~can_give, torch.inf).argmin()] -= 1
    return counts
