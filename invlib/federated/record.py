"""Record a local training loop: the update, the optimiser's steps and the batches, seen from outside."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from invlib.core.convert import as_images, as_shape, as_tokens
from invlib.core.network import unwrapped
from invlib.core.normalization import Normalization, as_normalization
from invlib.core.observation import ClientStep, Loss, Observation
from invlib.errors import ConfigError, DoubtWarning, InvlibError, ObservationError
from invlib.federated.capture import Sent, from_state_dicts
from invlib.federated.protocols import FedAvg, FedSGD

# Settings of FedAvg that neither an optimiser nor the network's inputs show.
UNSEEN = ("shuffle", "orders", "clip_norm", "proximal", "dropout")


class Recording:
    """What `record_client` has recorded, once its block has ended.

    Attributes:
        model: a copy of the network with the weights that the client received, which attacks need; parameters
            that the client did not train require no gradient in it.
        rates: the learning rate of each step of the optimiser.
        batch_sizes: on how many images each step ran the network; () where that was not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rates: tuple[float, ...] = ()
        self.batch_sizes: tuple[int, ...] = ()
        self._outcome: Observation | Exception = ObservationError(
            "the block of record_client has not ended; expected seen.observation after it"
        )

    @property
    def observation(self) -> Observation:
        """What the server sees of the client.

        Raises:
            ObservationError: the block has not ended, or has raised; the update is none, or does not fit.
            ConfigError: how the client trained cannot be said by `invlib.FedAvg`; the message names it.
        """
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


@contextmanager
def record_client(
    model: nn.Module,
    *,
    images: Any = None,
    num_images: int | None = None,
    image_shape: tuple[int, ...] | None = None,
    normalization: Normalization | None = None,
    protocol: ClientStep | None = None,
    labels: Any = None,
    training_mode: bool | None = None,
    loss: Loss | None = None,
    sent: Sent = None,
    vocabulary: Sequence[str] | None = None,
    **settings: Any,
) -> Iterator[Recording]:
    """Record what a local training loop does to a model, as the server would see it.

    What is wrong with the recording never stops the training: it is raised by ``seen.observation`` after the
    block. The optimiser, its rates and settings, the number of its steps, the batches and the mode are seen
    by hooks, which are gone after the block. What changes the gradient between ``backward`` and ``step`` is
    not seen: say it in ``settings``. What is doubtful warns, and stands in the observation's notes.

    Args:
        model: the model that is trained in the block, as it was received; wrappers are taken off.
        images: the client's images ``(N, C, H, W)`` or tokens ``(N, T)``; only their shape is taken.
        num_images: how many they are, in the place of ``images``.
        image_shape: ``(C, H, W)`` of one of them, or ``(T,)``; None takes what the network is called with.
        normalization: how the client encodes images in [0, 1]; text needs none.
        protocol: how it trains; None says it by what was seen of a `torch.optim.SGD`, Adam or AdamW.
        labels: where the server knows them.
        training_mode: of the client; None takes what was seen.
        loss: of the client, where it is known.
        sent: which numbers of the update are sent, see `invlib.from_arrays`.
        vocabulary: of text.
        **settings: of `invlib.FedAvg`, what cannot be seen: ``clip_norm``, ``proximal``, ``dropout``,
            ``shuffle``, ``orders``.

    Raises:
        ConfigError: an unknown setting, settings beside a protocol, or no normalisation of images.
        ObservationError: the model is none or cannot be copied, the images are none, or the protocol sends
            gradients.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> x, y = torch.full((2, 3, 2, 2), 0.5), torch.tensor([0, 1])
        >>> with record_client(net, images=x, normalization=Normalization(mean=(0,), std=(1,))) as seen:
        ...     optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        ...     nn.functional.cross_entropy(net(x), y).backward()
        ...     optimizer.step()
        >>> seen.observation.protocol
        FedAvg(lr=0.1, local_steps=1)
    """
    if unknown := [name for name in settings if name not in UNSEEN]:
        raise ConfigError(f"{unknown[0]} is no setting of record_client; expected some of {list(UNSEEN)}")
    if protocol is not None and settings:
        raise ConfigError(
            f"{next(iter(settings))} is given beside a protocol; expected it in the protocol itself"
        )
    if isinstance(protocol, FedSGD):
        raise ObservationError(
            "protocol is FedSGD, which sends gradients and changes no weights; expected FedAvg or None "
            "(from_gradients takes the gradients)"
        )
    if images is not None:
        tokens = as_tokens(images)
        count, *shape = (as_images(images) if tokens is None else tokens).shape
        if num_images not in (None, count) or (image_shape or tuple(shape)) != tuple(shape):
            raise ObservationError(
                f"images are {count} of shape {tuple(shape)}, num_images is {num_images} and image_shape is "
                f"{image_shape}; expected the images alone, or the two that they have"
            )
        num_images, image_shape = count, tuple(shape)
    elif num_images is not None:
        as_shape(image_shape or (1, 1, 1), num_images)
    if image_shape is None or len(image_shape) != 1:
        as_normalization(normalization)
    try:
        received = copy.deepcopy(unwrapped(model))
    except RuntimeError as error:
        raise ObservationError(
            f"the model cannot be copied: {error}; expected one whose tensors have no graph"
        ) from error
    watch = Watch(received, model)
    seen = Recording(received)
    try:
        with watch:
            yield seen
    except BaseException as error:
        seen._outcome = ObservationError(
            f"the block of record_client ended with {type(error).__name__}; expected a whole training"
        )
        raise
    try:
        after = {n: t.detach().clone() for n, t in _state(unwrapped(model)).items()}
        seen._outcome = watch.observation(
            after,
            num_images=num_images,
            image_shape=image_shape,
            normalization=normalization,
            protocol=protocol,
            labels=labels,
            training_mode=training_mode,
            loss=loss,
            sent=sent,
            vocabulary=vocabulary,
            settings=settings,
        )
    except Exception as error:  # the model's own code may raise anything
        seen._outcome = error if isinstance(error, InvlibError) else ObservationError(f"no update: {error}")
    seen.rates, seen.batch_sizes = tuple(watch.rates), watch.sizes


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of the network with gradients on: the shape of its input, its mode, and a sum of its input."""

    shape: tuple[int, ...]
    training: bool
    precision: torch.dtype | None
    total: Tensor


class Watch:
    """Sees, while it is entered, which steps an optimiser takes and on which batches the network runs.

    Args:
        received: the network with the weights that the client received, which is not trained itself.
        model: the network that is trained; None watches for any that is of the type and the shapes of
            ``received``, as where a framework builds it out of sight.
    """

    def __init__(self, received: nn.Module, model: nn.Module | None = None) -> None:
        self.received, self._given = received, model
        self.module = None if model is None else unwrapped(model)
        self.rates: list[float] = []
        self.steps: list[list[_Call]] = []
        self._calls: list[_Call] = []
        self._optimizer: Optimizer | None = None
        self._settings: list[dict[str, Any]] = []
        self._protocol: FedAvg | None = None
        self._trained: set[str] | None = None
        self._mixed = False
        self._error: InvlibError | None = None
        self._notes: list[str] = []
        self._hooks = ExitStack()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of images of each step; () where the network's calls were not seen."""
        return tuple(sum(call.shape[0] for call in calls) for calls in self.steps) if all(self.steps) else ()

    def __enter__(self) -> Watch:
        handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        if self._given is not None:
            handles.append(self._given.register_forward_pre_hook(self._called, with_kwargs=True))
        else:
            handles.append(register_module_forward_pre_hook(self._called_somewhere))
        for handle in handles:
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _called_somewhere(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if _class_of(module) == _class_of(self.received) and _shapes(module) == _shapes(self.received):
            self.module = module
            self._called(module, args, {})

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = next(iter((*args, *kwargs.values())), None)
        if not torch.is_grad_enabled() or not isinstance(given, Tensor) or not given.ndim:
            return
        kind = given.device.type
        self._mixed |= len({m.training for m in module.modules()}) > 1
        self._calls.append(
            _Call(
                shape=tuple(given.shape),
                training=module.training,
                precision=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
                total=given.detach().sum(dtype=torch.float64),
            )
        )

    def _own(self, optimizer: Optimizer) -> bool:
        """Say whether an optimiser has parameters of the network that is trained."""
        theirs = [p for group in optimizer.param_groups for p in group["params"]]
        if self.module is not None:
            return not {id(p) for p in theirs}.isdisjoint(map(id, self.module.parameters()))
        return Counter(p.shape for p in theirs) <= Counter(_shapes(self.received))

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        if self._optimizer is not None or not self._own(optimizer):
            return
        self._optimizer = optimizer
        if self.module is not None:
            moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
            wanted = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
            self._trained = {name for name, p in wanted.items() if id(p) in moved}
            if left := [name for name in wanted if name not in self._trained]:
                self._notes.append(
                    f"{left[0]!r} and {len(left) - 1} more parameters are trainable and not in the "
                    "optimizer: they count as frozen"
                )
            if any(hasattr(p, "grad_sample") for p in self.module.parameters()):
                self._notes.append(
                    "the client has gradients of single images, as for differential privacy: what clips and "
                    "noises them is not part of the protocol"
                )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self._protocol = FedAvg.from_optimizer(optimizer, local_steps=1)
            except InvlibError as error:
                self._error = error
        self._notes += [str(w.message) for w in caught if issubclass(w.category, DoubtWarning)]

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if not self._own(optimizer):
            return
        skipped = getattr(optimizer, "found_inf", None)  # torch.amp.GradScaler tells a fused optimiser
        if skipped is not None and bool(skipped):
            return
        if optimizer is not self._optimizer:
            self._error = ConfigError(
                f"{type(self._optimizer).__name__} and {type(optimizer).__name__} both step the model; "
                "expected one optimizer, or protocol="
            )
        self.rates.append(float(optimizer.param_groups[0]["lr"]))
        if {float(g["lr"]) for g in optimizer.param_groups} != {self.rates[-1]}:
            self._error = ConfigError(
                "groups of parameters have other rates than the first; expected one, or protocol="
            )
        settings = [{k: v for k, v in g.items() if k not in _MOVING} for g in optimizer.param_groups]
        self._settings = self._settings or settings
        if settings != self._settings:
            self._error = ConfigError(
                f"the settings of {type(optimizer).__name__} change between steps, besides its rate; "
                "expected them to stay, or protocol="
            )
        # a validation between two steps may leave gradients on
        training = [call for call in self._calls if call.training]
        self.steps.append(training or self._calls)
        self._calls = []

    def observation(
        self,
        after: Mapping[str, Any] | Sequence[Any],
        *,
        num_images: int | None,
        image_shape: tuple[int, ...] | None,
        protocol: ClientStep | None,
        training_mode: bool | None,
        settings: Mapping[str, Any],
        **facts: Any,
    ) -> Observation:
        """Make an observation of what was seen and of the state dict after the training.

        Args:
            after: as for `invlib.from_state_dicts`, like ``facts``.
            num_images: None takes the batch of the only step.
            image_shape: None takes what the network was called with.
            protocol: None says it by what was seen.
            training_mode: None takes what was seen.
            settings: of `invlib.FedAvg`, what cannot be seen.
            **facts: of `invlib.from_state_dicts`, the others.

        Raises:
            ObservationError: something was not given and not seen, or the two do not fit.
            ConfigError: the optimiser is none that `invlib.FedAvg` knows.
        """
        calls = [call for step in self.steps for call in step] or self._calls
        sizes, notes = self.sizes, list(self._notes)
        if num_images is None:
            if len(sizes) != 1:
                raise ObservationError(
                    f"num_images is None and {len(sizes)} steps were seen; expected how many images they used"
                )
            num_images = sizes[0]
        if image_shape is None:
            if not calls:
                raise ObservationError(
                    "image_shape is None and the model was not called with gradients on; expected (C, H, W)"
                )
            image_shape = calls[0].shape[1:]
        elif calls and tuple(calls[0].shape[1:]) != tuple(image_shape):
            notes.append(
                f"the model was called with inputs of shape {calls[0].shape[1:]}, not {tuple(image_shape)}"
            )
        if training_mode is None:
            here = self.received if self.module is None else self.module
            training_mode = calls[0].training if calls else here.training
        if protocol is None:
            protocol = self._seen_protocol(num_images, settings, notes)
        elif isinstance(protocol, FedAvg) and self.rates:
            expected = [_length(rows, num_images) for rows in protocol.batches(num_images)]
            if len(expected) != len(self.rates):
                notes.append(
                    f"the optimizer took {len(self.rates)} steps and the protocol says {len(expected)}"
                )
            elif sizes and list(sizes) != expected:
                notes.append(f"steps ran on batches of {_few(sizes)} and the protocol says {_few(expected)}")
        if self._mixed:
            notes.append("parts of the model ran in training mode and others in evaluation mode")
        if half := {call.precision for call in calls} - {None}:
            notes.append(f"the client ran in mixed precision ({half.pop()}), which rounds its update")
        before = _state(self.received)
        if self._trained is not None:
            for name, p in self.received.named_parameters():
                p.requires_grad_(name in self._trained)
        named = after if isinstance(after, Mapping) else dict(zip(before, after, strict=False))
        if other := [n for n, t in named.items() if n in before and _kind(t) != _kind(before[n])]:
            notes.append(
                f"{other[0]!r} went from {_kind(before[other[0]])} to {_kind(named[other[0]])}: the update "
                "holds the rounding too"
            )
        for note in notes:
            warnings.warn(note, DoubtWarning, stacklevel=4)
        found = from_state_dicts(
            self.received,
            before,
            after,
            protocol=protocol,
            num_images=num_images,
            image_shape=image_shape,
            training_mode=training_mode,
            **facts,
        )
        return replace(found, notes=(*dict.fromkeys((*notes, *found.notes)),))

    def _seen_protocol(self, count: int, settings: Mapping[str, Any], notes: list[str]) -> FedAvg:
        """Return the client's step as it was seen; what is doubtful is added to the notes."""
        if self._error is not None:
            raise self._error
        if self._protocol is None or not self.rates:
            raise ObservationError(
                "no optimizer of torch.optim stepped the model's parameters; expected one that does, or "
                "protocol="
            )
        lr = self.rates[0] if len({*self.rates}) == 1 else tuple(self.rates)
        seen = replace(self._protocol, lr=lr, local_steps=len(self.rates), **settings)
        sizes = self.sizes
        if not sizes:
            notes.append(
                "the model was not seen running (was it called as it was handed over, wrapper and all?): "
                "each step counts as on all images"
            )
            return seen
        if max(map(len, self.steps)) > 1:
            notes.append(
                "the model ran several times for one step, as where gradients add up or a gradient scaler "
                "skips a step: the step counts as on all of these images, by their mean"
            )
        if {*sizes} == {count}:
            self._check_inputs(1, notes)
            return seen
        for drop_last in (False, True):
            some = replace(seen, batch_size=min(max(sizes), count), drop_last=drop_last)
            if [_length(rows, count) for rows in some.batches(count)] == list(sizes):
                break
        else:
            notes.append(f"steps ran on batches of {_few(sizes)}, which are no batches of {count} images")
            return replace(some, drop_last=False)
        each = len(some._epoch(count))
        if self._check_inputs(each, notes, drop_last=drop_last) and "shuffle" not in settings:
            some = replace(some, shuffle=True)
        return some

    def _check_inputs(self, each: int, notes: list[str], *, drop_last: bool = False) -> bool:
        """Say whether a later epoch has other batches than the first; a note where it has other images."""
        sums = [float(sum(call.total for call in calls)) for calls in self.steps]
        epochs = [sums[k : k + each] for k in range(0, len(sums), each)]
        near = [abs(s) * 1e-6 + 1e-6 for s in sums[:each]]
        moved = any(
            abs(a - b) > bar
            for other in epochs[1:]
            for a, b, bar in zip(epochs[0], other, near, strict=False)
        )
        totals = [sum(epoch) for epoch in epochs if len(epoch) == each]
        if not drop_last and any(abs(t - totals[0]) > sum(near) for t in totals):
            notes.append("the network's inputs differ from epoch to epoch, as where images are augmented")
        return moved


_MOVING = {"params", "lr", "initial_lr"}


def _length(rows: slice | list[int], count: int) -> int:
    return len(range(count)[rows]) if isinstance(rows, slice) else len(rows)


def _few(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:5])) + (", …" if len(sizes) > 5 else "")


def _kind(value: Any) -> str:
    return str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")


def _class_of(model: nn.Module) -> tuple[str, str]:
    """Return the name of a class, which a function that makes a model may define anew each time."""
    return type(model).__module__, type(model).__qualname__


def _shapes(model: nn.Module) -> list[torch.Size]:
    return [p.shape for p in model.parameters()]


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without what is no tensor, and without the second names of tied parameters."""
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: value for name, value in model.state_dict().items() if name in known}
