"""What the server sees: the update, and the public facts about how it was made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from invlib.errors import ConfigError, ObservationError

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Normalization:
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

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ConfigError(
                f"normalization: mean has {len(self.mean)} channels and std has {len(self.std)}; "
                "expected the same number, at least one"
            )
        if any(not s > 0 for s in self.std):
            raise ConfigError(f"normalization: std is {self.std}; expected positive numbers")

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


class ClientStep(Protocol):
    """What a federated client computes: a differentiable function from images to an update.

    A client whose attribute ``stackable`` is True promises that it can be called with a leading dimension of
    restarts on every parameter, with inputs ``(N, restarts, C, H, W)`` and labels ``(N, restarts)``, and
    treats every restart by itself. Where it is missing or False each restart is computed by itself.
    """

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        params: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        loss: Loss = ...,
        on_step: Callable[[Mapping[str, Tensor], Tensor], None] | None = None,
        mode: Any = ...,
    ) -> dict[str, Tensor]:
        """Return the update by parameter name.

        ``mode`` says how gradients are computed; a client that has no such argument is not told.
        """
        ...

    def mean_gradient(self, update: Tensor, num_images: int) -> Tensor:
        """Turn one tensor of the update into the loss gradient averaged over the local steps."""
        ...


def stackable(protocol: ClientStep) -> bool:
    """Say whether a client promises that it treats every restart of a stack by itself."""
    return bool(getattr(protocol, "stackable", False))


def takes_mode(protocol: ClientStep) -> bool:
    """Say whether a client can be told how to compute its gradients, by an argument ``mode``.

    A subclass that hands on all keyword arguments takes it where the class that it derives from does.
    """
    for cls in type(protocol).__mro__:
        call = vars(cls).get("__call__")
        if call is None:
            continue
        named = inspect.signature(call).parameters if inspect.isfunction(call) else {}
        if "mode" in named:
            return True
        if not any(p.kind is p.VAR_KEYWORD for p in named.values()):
            return False
    return False


@dataclass(frozen=True, kw_only=True)
class Observation:
    """All that an honest-but-curious server sees of one client; it holds no image.

    Args:
        update: parameter name → tensor; a gradient for FedSGD, a weight difference for FedAvg.
        protocol: the client's step (`invlib.FedSGD` or `invlib.FedAvg`), public in federated learning.
        num_images: how many private images the client used.
        image_shape: ``(C, H, W)`` of one image.
        labels: int64 ``(N,)`` where the client revealed them, else None.
        normalization: how the client encodes images in [0, 1].
        buffers: the client's buffers after its step (batch-norm statistics), where it sent them.
        training_mode: whether the client ran the model in training mode.

    Source: the threat model of Geiping et al. 2020, arXiv 2003.14053, section 3.

    Taught in: chapter 1
    """

    update: Mapping[str, Tensor]
    protocol: ClientStep
    num_images: int
    image_shape: tuple[int, int, int]
    normalization: Normalization
    labels: Tensor | None = None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    training_mode: bool = False

    def faults(self, model: nn.Module) -> list[str]:
        """Return every way in which this observation does not fit the model, one sentence each."""
        return [
            *_name_faults(self.update, model),
            *_value_faults(self.update, model),
            *self._label_faults(model),
            *self._mode_faults(model),
        ]

    def validate(self, model: nn.Module) -> None:
        """Check that the observation fits the model.

        Raises:
            ObservationError: with *all* faults at once: missing or extra names, wrong shapes,
                non-finite numbers, labels out of range, training-mode batch norm with no statistics.
        """
        found = self.faults(model)
        if found:
            raise ObservationError("the observation does not fit the model:\n  - " + "\n  - ".join(found))

    def _label_faults(self, model: nn.Module) -> list[str]:
        if self.num_images < 1:
            return [f"num_images is {self.num_images}; expected at least 1"]
        if self.labels is not None and tuple(self.labels.shape) != (self.num_images,):
            return [f"labels have shape {tuple(self.labels.shape)}; expected ({self.num_images},)"]
        try:
            classes = num_classes(model, self.image_shape)
        except ObservationError as error:
            return [str(error)]
        if self.labels is not None and not ((self.labels >= 0) & (self.labels < classes)).all():
            return [f"labels {self.labels.tolist()} are out of range; expected 0 to {classes - 1}"]
        return []

    def _mode_faults(self, model: nn.Module) -> list[str]:
        if not self.training_mode or self.buffers or not _tracks_statistics(model):
            return []
        return [
            "training_mode is True and the model has batch norm, but buffers holds no batch-norm "
            "statistics; expected the buffers that the client sent (or training_mode=False)"
        ]


def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's parameters that require a gradient, detached, by name.

    Raises:
        ObservationError: the model has no trainable parameter.
    """
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ObservationError(
            f"{type(model).__name__} has 0 trainable parameters; expected at least one, "
            "since an update is made of their gradients"
        )
    return params


def num_classes(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return how many logits the model gives for one image of shape ``(C, H, W)``.

    Raises:
        ObservationError: the model cannot run on such an image, or gives no ``(N, classes)`` logits.
    """
    some = next(model.parameters(), None)
    zeros = torch.zeros(1, *image_shape) if some is None else some.new_zeros(1, *image_shape)
    try:
        with torch.no_grad(), in_mode(model, training=False):
            logits = model(zeros)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ObservationError(
            f"the model does not run on an image of shape {tuple(image_shape)} (C, H, W): {error}"
        ) from error
    if logits.ndim != 2:
        raise ObservationError(f"the model gives shape {tuple(logits.shape)}; expected logits (N, classes)")
    return int(logits.shape[1])


def forward(
    model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None, inputs: Tensor
) -> Tensor:
    """Run the model with the given parameters and buffers in place of its own."""
    logits: Tensor = functional_call(model, {**params, **(buffers or {})}, (inputs,))
    return logits


@contextmanager
def in_mode(model: nn.Module, *, training: bool, track_statistics: bool = False) -> Iterator[None]:
    """Put the model in training or evaluation mode for a while, and give each module its own mode back.

    Batch norm in training mode would write its running statistics into the model's buffers at every
    forward pass, which neither a simulated client nor an attack may do: they are off unless asked for.
    """
    modules = list(model.modules())
    modes = [(m.training, getattr(m, "track_running_stats", None)) for m in modules]
    try:
        model.train(training)
        for m in modules:
            if training and isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.track_running_stats = track_statistics and m.running_mean is not None
        yield
    finally:
        for m, (mode, tracking) in zip(modules, modes, strict=True):
            m.training = mode
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.track_running_stats = bool(tracking)


def _tracks_statistics(model: nn.Module) -> bool:
    return any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None for m in model.modules()
    )


def _name_faults(update: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    try:
        expected = trainable_parameters(model)
    except ObservationError as error:
        return [str(error)]
    missing = [name for name in expected if name not in update]
    extra = [name for name in update if name not in expected]
    faults = []
    if missing:
        faults.append(f"update lacks {_some(missing)}; expected one tensor for each trainable parameter")
    if extra:
        faults.append(f"update has {_some(extra)}, which the model's trainable parameters do not")
    return faults


def _value_faults(update: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    faults = []
    for name, value in update.items():
        if name in expected and value.shape != expected[name].shape:
            faults.append(
                f"update[{name!r}] has shape {tuple(value.shape)}; expected {tuple(expected[name].shape)}"
            )
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            faults.append(
                f"update[{name!r}] has {bad} NaN or infinite numbers of {value.numel()}; expected 0"
            )
    return faults


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
