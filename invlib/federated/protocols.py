"""The client's step as a differentiable function, and the observation that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.autodiff.gradients import PLAIN, GradientMode, LossOf, descend, gradient
from invlib.core.network import forward, in_mode, num_classes, trainable_parameters
from invlib.core.normalization import Normalization
from invlib.core.observation import ClientStep, Loss, Observation
from invlib.errors import ConfigError, ObservationError
from invlib.settings import Checked, Count, Positive, whole

OnStep = Callable[[Mapping[str, Tensor], Tensor], None]
_Passes = Annotated[int, whole("a whole number from 1 to 1,000,000", lambda n: 1 <= n <= 1_000_000)]


@dataclass(frozen=True, kw_only=True)
class FedSGD:
    r"""One client sends the gradient of its loss: :math:`g = \nabla_\theta L(f_\theta(x), y)`.

    Calling it with ``(model, inputs, labels)`` returns the gradient by parameter name; inputs are
    normalised images ``(N, C, H, W)``, labels int64 ``(N,)`` or probabilities ``(N, classes)``. The
    result is differentiable with respect to the inputs, so that an attack can call the same function.

    Raises:
        ObservationError: the model has no trainable parameter.

    Source: McMahan et al. 2017, arXiv 1602.05629.

    Taught in: chapter 1
    """

    @property
    def stackable(self) -> bool:
        """Whether the client treats every restart of a stack by itself; a subclass has to say so anew."""
        return type(self) is FedSGD

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        params: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        loss: Loss = F.cross_entropy,
        on_step: OnStep | None = None,
        mode: GradientMode = PLAIN,
    ) -> dict[str, Tensor]:
        """Return the gradient by parameter name."""
        params = dict(trainable_parameters(model) if params is None else params)
        if on_step is not None:
            on_step(params, inputs)
        return gradient(_loss_of(model, buffers, loss), params, inputs, labels, mode)

    def mean_gradient(self, update: Tensor, num_images: int) -> Tensor:
        """Return the update itself: it is already the mean gradient."""
        return update


@dataclass(frozen=True, kw_only=True)
class FedAvg(Checked):
    r"""One client trains for some steps and sends :math:`\theta_K - \theta_0`, its weight difference.

    Each local step is plain SGD,
    :math:`\theta_{k+1} = \theta_k - \eta \nabla_\theta L(f_{\theta_k}(x_k), y_k)`, over minibatches
    taken in order and around again. Called like `FedSGD`; the unrolled steps are differentiable with
    respect to the inputs.

    Args:
        lr: the client's learning rate :math:`\eta`.
        local_steps: how many SGD steps; give this or ``epochs``, not both.
        epochs: how many passes over the client's images.
        batch_size: images in a step; None takes all of them.
        drop_last: leave out a last, smaller minibatch instead of using it.

    Raises:
        ConfigError: neither or both of local_steps and epochs, or a number out of range.

    Source: McMahan et al. 2017, arXiv 1602.05629, algorithm 1.

    Taught in: chapter 4
    """

    lr: Positive
    local_steps: _Passes | None = None
    epochs: _Passes | None = None
    batch_size: Count | None = None
    drop_last: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.local_steps is None) == (self.epochs is None):
            raise ConfigError(
                f"FedAvg has local_steps={self.local_steps} and epochs={self.epochs}; "
                "expected exactly one of them"
            )

    @property
    def stackable(self) -> bool:
        """Whether the client treats every restart of a stack by itself; a subclass has to say so anew."""
        return type(self) is FedAvg

    def batches(self, num_images: int) -> list[slice]:
        """Return which images each local step uses, in order.

        Raises:
            ConfigError: batch_size is larger than num_images.
        """
        size = num_images if self.batch_size is None else self.batch_size
        if size > num_images:
            raise ConfigError(
                f"FedAvg batch_size is {size}; expected at most the {num_images} images there are"
            )
        stop = num_images - num_images % size if self.drop_last else num_images
        epoch = [slice(a, min(a + size, stop)) for a in range(0, stop, size)]
        steps = len(epoch) * self.epochs if self.epochs is not None else self.local_steps
        assert steps is not None
        return [epoch[k % len(epoch)] for k in range(steps)]

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        params: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        loss: Loss = F.cross_entropy,
        on_step: OnStep | None = None,
        mode: GradientMode = PLAIN,
    ) -> dict[str, Tensor]:
        """Return the weight difference by parameter name."""
        start = dict(trainable_parameters(model) if params is None else params)
        now = dict(start)
        for rows in self.batches(inputs.shape[0]):
            if on_step is not None:
                on_step(now, inputs[rows])
            loss_of = _loss_of(model, buffers, loss)
            now = descend(loss_of, now, inputs[rows], labels[rows], self.lr, mode)
        return {name: now[name] - start[name] for name in start}

    def mean_gradient(self, update: Tensor, num_images: int) -> Tensor:
        """Return ``-update / (lr * steps)``: the mean gradient of the local steps, with its own sign."""
        return update / (-self.lr * len(self.batches(num_images)))


def _loss_of(model: nn.Module, buffers: Mapping[str, Tensor] | None, loss: Loss) -> LossOf:
    return lambda params, inputs, labels: loss(forward(model, params, buffers, inputs), labels)


def observe(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    protocol: ClientStep,
    *,
    normalization: Normalization,
    reveal_labels: bool = True,
    training_mode: bool = False,
    loss: Loss = F.cross_entropy,
) -> Observation:
    """Run the client's step on its private images and return what the server sees of it.

    The model, its mode and its ``.grad`` are left as they were.

    Args:
        model: any `torch.nn.Module` that gives logits ``(N, classes)``.
        images: ``(N, C, H, W)`` in [0, 1].
        labels: int64 ``(N,)``.
        protocol: `FedSGD` or `FedAvg`.
        normalization: how the client encodes its images.
        reveal_labels: whether the server is told the labels.
        training_mode: whether the client runs the model in training mode; batch norm then uses the
            statistics of the batch, and the updated running statistics are sent as buffers.
        loss: the client's loss ``(logits, labels) -> scalar``.

    Raises:
        ObservationError: images or labels have the wrong shape, type or range, or the model has no
            trainable parameter.

    Taught in: chapter 1
    """
    _check_batch(model, images, labels)
    inputs = normalization.encode(images)
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}

    def update_statistics(params: Mapping[str, Tensor], batch: Tensor) -> None:
        with torch.no_grad(), in_mode(model, training=True, track_statistics=True):
            forward(model, params, buffers, batch)

    with in_mode(model, training=training_mode):
        update = protocol(
            model,
            inputs,
            labels,
            buffers={name: b.clone() for name, b in buffers.items()},
            loss=loss,
            on_step=update_statistics if training_mode else None,
        )
    return Observation(
        update={name: value.detach() for name, value in update.items()},
        protocol=protocol,
        num_images=images.shape[0],
        image_shape=(images.shape[1], images.shape[2], images.shape[3]),
        labels=labels.detach().clone() if reveal_labels else None,
        normalization=normalization,
        buffers=buffers,
        training_mode=training_mode,
    )


def _check_batch(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point() or images.shape[0] == 0:
        raise ObservationError(
            f"images have shape {tuple(images.shape)} and type {images.dtype}; "
            "expected floating point (N, C, H, W) with N at least 1"
        )
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ObservationError(
            f"images lie in [{low:.4g}, {high:.4g}]; expected [0, 1] (do not normalise them)"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ObservationError(
            f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; "
            f"expected int64 ({images.shape[0]},)"
        )
    trainable_parameters(model)
    classes = num_classes(model, (images.shape[1], images.shape[2], images.shape[3]))
    if not ((labels >= 0) & (labels < classes)).all():
        raise ObservationError(f"labels {labels.tolist()} are out of range; expected 0 to {classes - 1}")
