"""What the server sees: the update, and the public facts about how it was made."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.core.convert import as_labels, as_shape, as_tensor
from invlib.core.network import num_classes, trainable_parameters, unwrapped
from invlib.core.normalization import UNIT, Normalization, as_normalization
from invlib.errors import DoubtWarning, ObservationError, RecoveryError

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


def undefended(protocol: Any) -> Any:
    """Return the step of a client without its defences, where it is one that has some."""
    return protocol.client if hasattr(protocol, "release") else protocol


@dataclass(frozen=True, kw_only=True, repr=False)
class Observation:
    """All that an honest-but-curious server sees of one client; it holds no image.

    Arrays, lists and labels of other types are converted here, once.

    Args:
        update: parameter name → tensor; a gradient for FedSGD, a weight difference for FedAvg.
        protocol: the client's step (`invlib.FedSGD`, `invlib.FedAvg` or a function with the same arguments),
            public in federated learning.
        num_images: how many private images the client used.
        image_shape: ``(C, H, W)`` of one image; ``(T,)`` of token sequences of T tokens.
        labels: where the client revealed them, else None: classes int64 ``(N,)``, or whatever the loss takes,
            ``(N, ...)``.
        normalization: how the client encodes images in [0, 1]; a pair of tuples, mean and std, will do.
            Text has none.
        buffers: the client's buffers after its step (batch-norm statistics), where it sent them.
        training_mode: whether the client ran the model in training mode.
        sent: parameter name → bool tensor of its shape, for those of which the client sent a part: True
            where a number was sent. The others are zeros in ``update``, which no attack reads.
        loss: the client's loss ``(logits, labels) -> scalar``, where it is known; None is cross-entropy,
            unless an attack is told otherwise.
        notes: what is doubtful about how the observation was made, a sentence each; every attack hands
            them on in `Reconstruction.warnings`.
        vocabulary: of text, the word of each token, to print what is recovered.

    Raises:
        ObservationError: something is of a kind that cannot be converted, or contradicts itself.
        ConfigError: the normalization is none.

    Source: the threat model of Geiping et al. 2020, arXiv 2003.14053, section 3.

    Taught in: chapter 1
    """

    update: Mapping[str, Tensor]
    protocol: ClientStep
    num_images: int
    image_shape: tuple[int, ...]
    normalization: Normalization = None  # type: ignore[assignment] # of images it has to be given
    labels: Tensor | None = None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    training_mode: bool = False
    sent: Mapping[str, Tensor] = field(default_factory=dict)
    loss: Loss | None = None
    notes: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("update", "buffers", "sent"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise ObservationError(f"{name} is a {type(value).__name__}; expected name → tensor")
        if isinstance(self.protocol, type) or not callable(self.protocol):
            raise ObservationError(
                f"protocol is {self.protocol!r}; expected one such as FedSGD(), an instance"
            )
        if not isinstance(self.training_mode, bool):
            raise ObservationError(f"training_mode is {self.training_mode!r}; expected True or False")
        count, shape = as_shape(self.image_shape, self.num_images)
        text = len(shape) == 1
        normalization = UNIT if text and self.normalization is None else as_normalization(self.normalization)
        if not text and len(normalization.mean) not in (1, shape[0]):
            raise ObservationError(
                f"normalization has {len(normalization.mean)} channels and image_shape is {shape}; "
                "expected the same number, or one for all"
            )
        known = {
            "update": {n: as_tensor(f"update[{n!r}]", v) for n, v in self.update.items()},
            "buffers": {n: as_tensor(f"buffers[{n!r}]", v) for n, v in self.buffers.items()},
            "sent": {n: as_tensor(f"sent[{n!r}]", v).bool() for n, v in self.sent.items()},
            "num_images": count,
            "image_shape": shape,
            "normalization": normalization,
        }
        if self.labels is not None:
            plain = self.loss is None or self.loss is F.cross_entropy
            known["labels"] = as_labels(self.labels, classes_only=plain, text=text)
        if self.vocabulary is not None:
            known["vocabulary"] = _as_vocabulary(self.vocabulary, text)
        for name, value in known.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        numbers = sum(value.numel() for value in self.update.values())
        told = "hidden" if self.labels is None else f"shape {tuple(self.labels.shape)}"
        mode = ", training mode" if self.training_mode else ""
        part = f", {sum(int((~m).sum()) for m in self.sent.values()):,} not sent" if self.sent else ""
        shape = "×".join(str(n) for n in (self.num_images, *self.image_shape))
        return (
            f"Observation({numbers:,} numbers in {len(self.update)} tensors{part}, "
            f"{words_of(self.protocol)}, {'tokens' if self.is_text else 'images'} {shape}, "
            f"labels {told}{mode})"
        )

    @property
    def is_text(self) -> bool:
        """Whether it is of token sequences ``(T,)``, not of images."""
        return len(self.image_shape) == 1

    def in_words(self, tokens: Tensor) -> tuple[str, ...]:
        """Return token sequences ``(N, T)`` as they read, unknown ones as ``_``; () without a vocabulary."""
        words = self.vocabulary
        if words is None:
            return ()
        return tuple(
            " ".join("_" if not 0 <= v < len(words) else words[v] for v in row) for row in tokens.tolist()
        )

    def mean_gradient(self, name: str, model: nn.Module | None = None) -> Tensor:
        """Return the mean gradient of one parameter over the client's local steps.

        Args:
            name: of the parameter.
            model: the model that the client received, unwrapped: what weight decay did to its weights is
                taken off. Without it that is read as a part of the gradient, with a `DoubtWarning`.

        Raises:
            RecoveryError: it was not sent, or only in part, or the client's step cannot say how its update
                and its gradients are related.
        """
        if name not in self.update:
            raise RecoveryError(f"the update lacks {name!r}; expected its gradient")
        if name in self.sent:
            share = self.sent[name].double().mean().item()
            raise RecoveryError(
                f"only {share:.1%} of the numbers of {name!r} were sent; expected all of them"
            )
        turn = getattr(self.protocol, "mean_gradient", None)
        if turn is None:
            raise RecoveryError(
                f"the client's step {words_of(self.protocol)} has no method mean_gradient, which turns its "
                "update into a gradient"
            )
        update = self.update[name]
        if model is not None:
            update = self.without_decay(name, model)
        elif decay := getattr(self.protocol, "weight_decay", 0):
            warnings.warn(
                f"the client's weight decay of {decay} is read as a part of its gradient",
                DoubtWarning,
                stacklevel=2,
            )
        gradient: Tensor = turn(update, self.num_images)
        return gradient

    def without_decay(self, name: str, model: nn.Module) -> Tensor:
        """Return one tensor of the update without weight decay, where the client's step tells it."""
        update, response = self.update[name], getattr(self.protocol, "response", None)
        linear = getattr(self.protocol, "linear", True)
        if response is None or not linear or not getattr(self.protocol, "weight_decay", 0):
            return update
        weight, factor = trainable_parameters(model)[name].detach().to(update), response(self.num_images)[2]
        return update + float(factor) * weight

    def faults(self, model: nn.Module) -> list[str]:
        """Return every way in which this observation does not fit the model, one sentence each."""
        try:
            model = unwrapped(model)
        except ObservationError as error:
            return [str(error)]
        return [
            *_name_faults(self.update, model),
            *_value_faults(self.update, self.sent, model),
            *self._label_faults(model),
            *self._mode_faults(model),
        ]

    def validate(self, model: nn.Module, *, text: bool | None = False) -> nn.Module:
        """Check that the observation fits the model, and return the model without its wrappers.

        Args:
            model: the model that the client received.
            text: what the caller is for: False for images, True for token sequences, None for both.

        Raises:
            ObservationError: it is of the other kind; or, with *all* faults at once: missing or extra names,
                wrong shapes, non-finite numbers, labels out of range, statistics that moved in evaluation
                mode.
        """
        if text is not None and text != self.is_text:
            raise ObservationError(
                f"the observation is of token sequences {self.image_shape}; expected images "
                "(token_embedding is the attack on text)"
                if self.is_text
                else f"the observation is of images {self.image_shape}; expected token sequences (T,)"
            )
        if faults := self.faults(model):
            raise ObservationError("the observation does not fit the model:\n  - " + "\n  - ".join(faults))
        return unwrapped(model)

    def _label_faults(self, model: nn.Module) -> list[str]:
        if self.labels is not None and self.labels.shape[0] != self.num_images:
            return [f"labels have shape {tuple(self.labels.shape)}; expected ({self.num_images},)"]
        try:
            classes = num_classes(model, self.image_shape)
        except ObservationError as error:
            return [str(error)]
        if self.labels is None or self.labels.is_floating_point() or self.labels.ndim > 1:
            return []
        if not ((self.labels >= 0) & (self.labels < classes)).all():
            return [f"labels {self.labels.tolist()} are out of range; expected 0 to {classes - 1}"]
        return []

    def _mode_faults(self, model: nn.Module) -> list[str]:
        """Batch-norm statistics that moved prove that the client ran the model in training mode."""
        if self.training_mode:
            return []
        own = dict(model.named_buffers())
        moved = [
            name
            for name, value in self.buffers.items()
            if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
            and name in own
            and not torch.equal(value.to(own[name]), own[name])
        ]
        if not moved:
            return []
        return [
            f"buffers {_some(moved)} differ from the model's, so that the client ran it in training mode; "
            "expected training_mode=True (or the buffers that the client received)"
        ]


def _as_vocabulary(value: Any, text: bool) -> tuple[str, ...]:
    if not text:
        raise ObservationError("vocabulary is given for images; expected it with token sequences (T,) alone")
    words = value if isinstance(value, (list, tuple)) else ()
    if not words or not all(isinstance(word, str) for word in words):
        raise ObservationError(
            f"vocabulary is a {type(value).__name__}; expected a list of words, one for each token"
        )
    return tuple(words)


def words_of(protocol: object) -> str:
    """Return a client's step in a word: a function by its name."""
    return str(getattr(protocol, "__name__", None) or protocol)


def _name_faults(update: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    try:
        expected = trainable_parameters(model)
    except ObservationError as error:
        return [str(error)]
    missing = [name for name in expected if name not in update]
    extra = [name for name in update if name not in expected]
    faults = []
    if missing:
        faults.append(
            f"update lacks {_some(missing)}; expected one tensor for each trainable parameter "
            "(where the others were not sent, from_arrays takes sent='given')"
        )
    if extra:
        faults.append(f"update has {_some(extra)}, which the model's trainable parameters do not")
    return faults


def _value_faults(update: Mapping[str, Tensor], sent: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    faults = [
        f"sent[{name!r}] does not fit; expected a mask of the shape of update[{name!r}]"
        for name, mask in sent.items()
        if name not in update or mask.shape != update[name].shape
    ]
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
