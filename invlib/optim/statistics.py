"""The statistics of the client's batch, from the running statistics of batch norm that it sent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from invlib.core.network import blank, record_layers
from invlib.core.observation import Observation
from invlib.errors import RecoveryError

Rows = slice | list[int]
_ROUNDING = 1e-3  # how far below zero rounding may take a variance, as a share of the running ones


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStatistics:
    r"""What one batch-norm layer computed of the client's batch.

    Of several local steps both are means over the steps, with the weights that running statistics give them.

    Args:
        mean: float64 ``(C,)``.
        variance: float64 ``(C,)``, divided by the number of values and not by one less.
        eps: what the layer adds to the variance.
        parts: the images of each different minibatch, and their weight.
    """

    mean: Tensor
    variance: Tensor
    eps: float
    parts: tuple[tuple[Rows, float], ...]

    def to(self, like: Tensor) -> LayerStatistics:
        """Return them in the type and on the device of a tensor."""
        return replace(self, mean=self.mean.to(like), variance=self.variance.to(like))

    def of(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance, likewise, of other inputs of the layer ``(N, C, ...)``."""
        axes = [0, *range(2, given.ndim)]
        seen = [(weight, given[rows]) for rows, weight in self.parts]
        means = torch.stack([weight * part.mean(axes) for weight, part in seen])
        variances = torch.stack([weight * part.var(axes, correction=0) for weight, part in seen])
        return means.sum(0), variances.sum(0)

    def gaps(self, given: Tensor) -> Tensor:
        r"""Return what other inputs of the layer leave of its equations, ``(2, C)``: 0 where they hold.

        They are :math:`(\mu(x) - \mu)/\sigma` and :math:`\log \sigma(x)/\sigma`, with the layer's eps in each
        standard deviation :math:`\sigma`.
        """
        (mean, variance), told = self.of(given), self.to(given)
        own = (told.variance + self.eps).sqrt()
        return torch.stack([(mean - told.mean) / own, ((variance + self.eps).sqrt() / own).log()])


def batch_statistics(model: nn.Module, observation: Observation) -> dict[str, LayerStatistics]:
    r"""Return the statistics of the client's batch at each batch-norm layer, from the buffers that it sent.

    With momentum :math:`a`, K local steps leave the running statistics
    :math:`r_K = (1-a)^K r_0 + \sum_k a (1-a)^{K-1-k} s_k`. The server knows all of this but the batch's
    :math:`s_k`: it computes their weighted mean, and of one step :math:`s` itself. Without a momentum the
    layer keeps the plain mean of all batches that it ever saw. The running variance is one divided by
    :math:`n - 1`; here it is divided by the number :math:`n` of values, as the layer does to normalise.

    Args:
        model: the model that the client received.
        observation: what the server saw of a client in training mode, with its buffers.

    Returns:
        By name of the layer, in the order of the network. A layer that runs twice in a step is left out.

    Raises:
        RecoveryError: no statistics were sent, or they are not of such a client; a layer saw a single value
            of each channel, which has no variance.

    Source: this project's; compare Yin et al. 2021, arXiv 2104.07586, where the statistics are given.

    Taught in: chapter 3
    """
    _, calls = record_layers(model, blank(observation.image_shape), nn.modules.batchnorm._BatchNorm)
    often = Counter(call.name for call in calls)
    found = {}
    for call in calls:
        layer: Any = call.layer
        name = call.name
        before = {key: b.detach().double().cpu() for key, b in layer.named_buffers()}
        after = {
            key: observation.buffers[f"{name}.{key}"].double().cpu()
            for key in before
            if f"{name}.{key}" in observation.buffers
        }
        if not {"running_mean", "running_var"} <= {*after} or often[name] > 1:
            continue
        if all(torch.equal(after[key], before[key]) for key in ("running_mean", "running_var")):
            continue
        first = float(before["num_batches_tracked"])
        counted = after.get("num_batches_tracked")
        steps = _steps(observation, None if counted is None else int(counted - first))
        if layer.momentum is None:
            kept, weights = first / (first + len(steps)), [1 / len(steps)] * len(steps)
        else:
            kept = (1 - layer.momentum) ** len(steps)
            powers = [(1 - layer.momentum) ** k for k in reversed(range(len(steps)))]
            weights = [power / sum(powers) for power in powers]
        mean, variance = (
            (after[key] - kept * before[key]) / (1 - kept) for key in ("running_mean", "running_var")
        )
        of_image = call.given[0, 0].numel()
        sizes = [of_image * len(torch.arange(observation.num_images)[rows]) for rows in steps]
        if min(sizes) == 1:
            raise RecoveryError(
                f"the batch-norm layer {name!r} saw one value of each channel, whose variance is zero: "
                "all images look alike to what follows; expected several images, or larger maps"
            )
        if (variance < -_ROUNDING * (before["running_var"] + after["running_var"])).any():
            raise RecoveryError(
                f"the running variances of {name!r} give a batch's of {float(variance.min()):.2g}; expected "
                f"those of a client with momentum {layer.momentum} and {len(steps)} local step(s)"
            )
        parts: dict[str, tuple[Rows, float]] = {}
        for rows, weight in zip(steps, weights, strict=True):
            parts[str(rows)] = rows, parts.get(str(rows), (rows, 0.0))[1] + weight
        biased = sum(weight * (1 - 1 / size) for weight, size in zip(weights, sizes, strict=True))
        found[name] = LayerStatistics(
            mean=mean, variance=(biased * variance).clamp_min(0), eps=layer.eps, parts=(*parts.values(),)
        )
    if not found:
        raise RecoveryError(
            f"the client sent no running statistics of {type(model).__name__} that moved; expected buffers "
            "of a batch-norm layer in training mode"
        )
    return found


def _steps(observation: Observation, counted: int | None) -> list[Rows]:
    """Return the images of each local step, of which the layers counted so many, if they were asked."""
    batches = getattr(observation.protocol, "batches", None)
    steps: list[Rows] = batches(observation.num_images) if batches else [slice(None)] * (counted or 1)
    if counted not in (None, len(steps)):
        raise RecoveryError(
            f"the batch-norm layers counted {counted} batches; expected the protocol's {len(steps)} local "
            "steps"
        )
    return steps
