"""Label inference: which classes a client trained on, read off the update before any image is sought."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.core.network import classifier, forward, in_mode, trainable_parameters
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
    :math:`\bar p` is estimated by running the model on random images. Without a bias, the row sums of the
    weight gradient take its place, divided by the mean sum of the features. A weight update is turned
    into a mean gradient first, which also mends its opposite sign.

    Args:
        model: the model that the client received.
        observation: what the server saw.
        samples: how many random images estimate the mean prediction of a batch.

    Returns:
        The labels (exact for one image and a bias; an estimate for batches).

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
    per_class = gradient if gradient.ndim == 1 else gradient.sum(1)
    source = "bias gradient" if gradient.ndim == 1 else "row sums of the weight gradient"
    if observation.num_images == 1:
        labels = per_class.argmin().reshape(1)
        counts = torch.bincount(labels, minlength=len(per_class))
        return LabelInference(labels=labels, counts=counts, method=f"smallest entry of the {source}")
    predictions, feature_sum = _typical_output(model, observation, samples)
    scale = feature_sum if gradient.ndim == 2 else torch.ones_like(feature_sum)
    expected = observation.num_images * (predictions - per_class / scale)
    counts = _whole_counts(expected, present=per_class * scale.sign() < 0, total=observation.num_images)
    labels = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return LabelInference(labels=labels, counts=counts, method=f"counts from the {source}")


def _typical_output(model: nn.Module, observation: Observation, samples: int) -> tuple[Tensor, Tensor]:
    """Return the mean prediction and the mean sum of the last layer's inputs on random images.

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
    features: list[Tensor] = []
    layer = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    handle = layer.register_forward_pre_hook(lambda _, arguments: features.append(arguments[0]))
    try:
        with torch.no_grad(), in_mode(model, training=observation.training_mode):
            logits = torch.cat([forward(model, end, None, inputs) for end in ends])
    finally:
        handle.remove()
    return logits.softmax(-1).mean(0), torch.cat(features).sum(-1).mean()


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
