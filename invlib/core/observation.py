"""What the server sees: the update, and the public facts about how it was made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from invlib.core.network import num_classes, tracks_statistics, trainable_parameters
from invlib.core.normalization import Normalization
from invlib.errors import ObservationError

Loss = Callable[[Tensor, Tensor], Tensor]


class ClientStep(Protocol):
    """What a federated client computes: a differentiable function from images to an update.

    A client whose attribute ``stackable`` is True promises that it can be called with a leading dimension of
    restarts on every parameter, with inputs ``(N, restarts, C, H, W)`` and labels ``(N, restarts)``, that it
    treats every restart by itself, and that it computes gradients as the argument ``mode`` says. Where one of
    the two is missing each restart is computed by itself.
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
    return bool(getattr(protocol, "stackable", False)) and takes_mode(protocol)


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
        if faults := self.faults(model):
            raise ObservationError("the observation does not fit the model:\n  - " + "\n  - ".join(faults))

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
        if not self.training_mode or self.buffers or not tracks_statistics(model):
            return []
        return [
            "training_mode is True and the model has batch norm, but buffers holds no batch-norm "
            "statistics; expected the buffers that the client sent (or training_mode=False)"
        ]


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
