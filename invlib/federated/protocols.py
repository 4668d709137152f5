"""The client's step as a differentiable function, and the observation that it makes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.autodiff.gradients import PLAIN, GradientMode, LossOf, State, descend, gradient
from invlib.core.convert import as_images, as_labels, as_tokens
from invlib.core.network import (
    forward,
    in_mode,
    like,
    logits_of,
    num_classes,
    placed,
    trainable_parameters,
    unwrapped,
)
from invlib.core.normalization import Normalization, as_normalization
from invlib.core.observation import ClientStep, Loss, Observation, undefended
from invlib.errors import ConfigError, DoubtWarning, ObservationError
from invlib.federated import rules
from invlib.federated.dropout import Masks
from invlib.federated.optimizers import settings_of
from invlib.settings import Below1, Checked, Count, Finite, NotNegative, Positive, Rule, Seed, real, whole

OnStep = Callable[[Mapping[str, Tensor], Tensor], None]
CLIENT_SEED = 0x0B5E2FE  # of a simulated client's dropout, where nothing else is said
_ORDERS = Rule(
    "permutations of the images",
    lambda orders: (
        isinstance(orders, (tuple, list))
        and len(orders) > 0
        and all(isinstance(o, (tuple, list)) and o and set(o) == {*range(len(o))} for o in orders)
        and len({len(o) for o in orders}) == 1
        and all(len(set(o)) == len(o) for o in orders)
    ),
)
_RATE = real("a rate from 0 on", lambda rate: rate >= 0)
_RATES = Rule(
    "a tuple of rates from 0 on",
    lambda rates: isinstance(rates, tuple) and len(rates) > 0 and all(map(_RATE.holds, rates)),
)
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
        return gradient(loss_by_parameters(model, buffers, loss), params, inputs, labels, mode)

    def mean_gradient(self, update: Tensor, num_images: int) -> Tensor:
        """Return the update itself: it is already the mean gradient."""
        return update


@dataclass(frozen=True, kw_only=True, repr=False)
class FedAvg(Checked):
    r"""One client trains for some steps and sends :math:`\theta_K - \theta_0`, its weight difference.

    Each local step is plain SGD,
    :math:`\theta_{k+1} = \theta_k - \eta \nabla_\theta L(f_{\theta_k}(x_k), y_k)`, unless another optimiser
    is named, over minibatches taken in order and around again. Whatever the optimiser keeps begins anew, as
    it does in every round of the usual frameworks. Called like `FedSGD`; the unrolled steps are
    differentiable with respect to the inputs.

    Args:
        lr: the client's learning rate :math:`\eta`, or a schedule: a tuple of rates, one for each local step
            (of more rates than steps, the first).
        local_steps: how many SGD steps; give this or ``epochs``, not both.
        epochs: how many passes over the client's images.
        batch_size: images in a step; None takes all of them.
        drop_last: leave out a last, smaller minibatch instead of using it.
        shuffle: draw a new order of the images in each epoch, as most loaders do. The server is not told;
            an attack begins with the order as it is, looks for the client's in what it found, and goes on in
            it, and `GradientMatching.score` looks for it with the images that it is given.
        orders: the images in the order of each epoch, where they are known; then around again.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``, each as `torch.optim` has it.
        momentum: of SGD; 0 is plain SGD.
        dampening: of SGD's momentum.
        nesterov: whether SGD's momentum is Nesterov's.
        weight_decay: added to the gradient (SGD, Adam), or taken off the weights (AdamW).
        betas: of Adam and AdamW: how much of the mean gradient and of its square is kept.
        eps: of Adam and AdamW.
        clip_norm: the longest gradient, as `torch.nn.utils.clip_grad_norm_` shortens it before each step.
        proximal: :math:`\mu` of FedProx, which adds :math:`\tfrac{\mu}{2} \|\theta - \theta_0\|^2` to the
            loss.
        dropout: what it draws in training mode: ``"drawn"``, anew at each call, as the server has to where it
            knows nothing; a seed, from which torch's generator draws all masks of a call, where the client
            or the server set it; ``"expected"``, nothing: the gradient of the mean network, with which an
            attack may replace what it does not know.

    Raises:
        ConfigError: neither or both of local_steps and epochs, a number out of range, or a setting of another
            optimiser than the one that is named.

    Source: McMahan et al. 2017, arXiv 1602.05629, algorithm 1; Li et al. 2020 (FedProx), arXiv 1812.06127.

    Taught in: chapter 4
    """

    lr: Positive | Annotated[tuple[float, ...], _RATES]
    local_steps: _Passes | None = None
    epochs: _Passes | None = None
    batch_size: Count | None = None
    drop_last: bool = False
    shuffle: bool = False
    orders: Annotated[tuple[tuple[int, ...], ...], _ORDERS] | None = None
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: NotNegative = 0.0
    dampening: Finite = 0.0
    nesterov: bool = False
    weight_decay: NotNegative = 0.0
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    eps: Positive = 1e-8
    clip_norm: Positive | None = None
    proximal: NotNegative = 0.0
    dropout: Literal["drawn", "expected"] | Seed = "drawn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.local_steps is None) == (self.epochs is None):
            raise ConfigError(
                f"FedAvg has local_steps={self.local_steps} and epochs={self.epochs}; "
                "expected exactly one of them"
            )
        if self.orders is not None:
            object.__setattr__(self, "orders", tuple(tuple(order) for order in self.orders))
        plain, given = self.optimizer == "sgd", self._given()
        for name in ("betas", "eps") if plain else ("momentum", "dampening", "nesterov"):
            if name in given:
                raise ConfigError(
                    f"FedAvg {name} is {given[name]} and optimizer is {self.optimizer!r}; expected {name} "
                    f"with {'adam' if plain else 'sgd'} alone"
                )
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ConfigError(
                f"FedAvg nesterov is True with momentum={self.momentum} and dampening={self.dampening}; "
                "expected momentum above 0 and no dampening"
            )

    @classmethod
    def from_optimizer(
        cls,
        optimizer: torch.optim.Optimizer,
        loader: Any = None,
        *,
        scheduler: Any = None,
        per_epoch: bool = False,
        **settings: Any,
    ) -> FedAvg:
        """Return the client that trains with an optimiser of `torch.optim`, on batches of a data loader.

        Args:
            optimizer: a `torch.optim.SGD`, `torch.optim.Adam` or `torch.optim.AdamW`, of all trainable
                parameters of the model, as it is before the client's first step.
            loader: a `torch.utils.data.DataLoader` of the client's images, whose batch size, last batch and
                shuffling are taken; None takes them from ``settings``.
            scheduler: of the learning rate, where there is one, as it is before the first step; it stays as
                it is.
            per_epoch: the scheduler is stepped after every epoch, not after every local step.
            settings: of `FedAvg`, what neither holds: ``epochs`` or ``local_steps``, ``clip_norm``.

        Raises:
            ConfigError: a setting that `FedAvg` does not have, an optimiser of another class, groups of
                parameters whose settings differ, or a loader that draws in another way.
        """
        return cls(**settings_of(optimizer, loader, scheduler, per_epoch, settings))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self._given().items())})"

    def _given(self) -> dict[str, Any]:
        """Return the settings that are not their defaults."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    @property
    def stackable(self) -> bool:
        """Whether the client treats every restart of a stack by itself; a subclass has to say so anew."""
        return type(self) is FedAvg and isinstance(self.dropout, str)

    @property
    def linear(self) -> bool:
        """Whether the update is a sum of gradients, with numbers as their factors; that of Adam is none."""
        return self.optimizer == "sgd"

    def passes(self, num_images: int) -> int:
        """Return how many passes over the client's images are begun."""
        return -(-len(self.batches(num_images)) // len(replace(self, orders=None)._epoch(num_images)))

    def batches(self, num_images: int) -> list[slice | list[int]]:
        """Return which images each local step uses, in order.

        Raises:
            ConfigError: batch_size is larger than num_images, ``orders`` are of other images, or rates are
                missing.
        """
        epoch = self._epoch(num_images)
        steps = len(epoch) * self.epochs if self.epochs is not None else self.local_steps
        assert steps is not None
        if isinstance(self.lr, tuple) and len(self.lr) < steps:
            raise ConfigError(f"FedAvg lr has {len(self.lr)} rates; expected one for each of {steps} steps")
        rows = [(k // len(epoch), epoch[k % len(epoch)]) for k in range(steps)]
        if self.orders is None:
            return [part for _, part in rows]
        if len(self.orders[0]) != num_images:
            raise ConfigError(
                f"FedAvg orders are of {len(self.orders[0])} images; expected the {num_images} there are"
            )
        return [list(self.orders[k % len(self.orders)][part]) for k, part in rows]

    def drawn(self, num_images: int) -> FedAvg:
        """Return the client with the orders that it draws, from torch's global generator."""
        if not self.shuffle or self.orders is not None:
            return self
        orders = [tuple(torch.randperm(num_images).tolist()) for _ in range(self.passes(num_images))]
        return replace(self, orders=tuple(orders))

    def _epoch(self, num_images: int) -> list[slice]:
        size = num_images if self.batch_size is None else self.batch_size
        if size > num_images:
            raise ConfigError(
                f"FedAvg batch_size is {size}; expected at most the {num_images} images there are"
            )
        stop = num_images - num_images % size if self.drop_last else num_images
        return [slice(a, min(a + size, stop)) for a in range(0, stop, size)]

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
        now, state, masks = dict(start), State(), Masks(model, self.dropout)
        for k, rows in enumerate(self.batches(inputs.shape[0])):
            if on_step is not None:
                on_step(now, inputs[rows])
            loss_of = masks.of(loss_by_parameters(model, buffers, loss))
            rule = partial(self._rule, start=start, step=k, stacked=mode.kind in ("mapped", "stacked"))
            now, state = descend(loss_of, now, inputs[rows], labels[rows], rule, state, mode)
        return {name: now[name] - start[name] for name in start}

    def _rule(
        self,
        params: rules.Named,
        slopes: rules.Named,
        state: State,
        *,
        start: rules.Named,
        step: int,
        stacked: bool = False,
    ) -> tuple[dict[str, Tensor], State]:
        """Take the local step of that number, from 0, along a gradient of the loss."""
        if self.proximal:
            slopes = {name: g + self.proximal * (params[name] - start[name]) for name, g in slopes.items()}
        if self.clip_norm is not None:
            slopes = rules.clipped(slopes, self.clip_norm, stacked=stacked)
        lr = self.lr[step] if isinstance(self.lr, tuple) else self.lr
        if self.optimizer == "sgd":
            settings = {name: getattr(self, name) for name in ("momentum", "dampening", "nesterov")}
            return rules.sgd(params, slopes, state, lr=lr, weight_decay=self.weight_decay, **settings)
        return rules.adam(
            params,
            slopes,
            state,
            step=step + 1,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            decoupled=self.optimizer == "adamw",
        )

    @property
    def mean_gradient(self) -> Callable[[Tensor, int], Tensor]:
        """Turn a tensor of the update and the number of images into the mean gradient, with its own sign.

        Without momentum it is ``-update / (lr * steps)``. With it, rates that differ or a proximal term, the
        steps' gradients have the weights that they have in the update. Clipping only changes the length, and
        weight decay counts as a part of the gradient, of which `Observation.mean_gradient` warns.

        Raises:
            AttributeError: the client runs Adam, whose update is no sum of gradients.
        """
        if not self.linear:
            raise AttributeError(f"the update of {self} is no sum of gradients, so that it has no mean")
        return self._mean_gradient

    def _mean_gradient(self, update: Tensor, num_images: int) -> Tensor:
        return update / -self.response(num_images)[0]

    def response(self, num_images: int) -> tuple[float, float, float]:
        r"""Say how SGD's update depends on gradients and weights, clipping apart.

        The update is :math:`-\sum_k c_k g_k - d\, \theta_0`; with gradients that are all the same,
        :math:`\theta_k = \theta_0 - w_k g`.

        Returns:
            :math:`W = \sum_k c_k`; :math:`a = \sum_k c_k w_k / W^2`, how far along the update the mean of the
            weights lies at which gradients are taken; and :math:`d`.
        """
        steps, moved = len(self.batches(num_images)), {"momentum", "proximal", "weight_decay"}
        if not isinstance(self.lr, tuple) and not self._given().keys() & moved:
            return self.lr * steps, (steps - 1) / (2 * steps), 0.0
        client = replace(self, clip_norm=None)
        start = {"": torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)}
        now, state = start, State()
        for k in range(len(self.batches(num_images))):
            slopes = {
                "": torch.stack([torch.ones_like(now[""][0]), -now[""][0], torch.zeros_like(now[""][0])])
            }
            now, state = client._rule(now, slopes, state, start=start, step=k)
        whole, along, left = now[""].tolist()
        if whole == 0:
            raise ConfigError(f"{self} takes no step; expected rates of which one is above 0")
        return -whole, -along / whole**2, 1 - left


def loss_by_parameters(model: nn.Module, buffers: Mapping[str, Tensor] | None, loss: Loss) -> LossOf:
    """Return the client's loss as a function of parameters, inputs and labels."""
    return lambda params, inputs, labels: loss(forward(model, params, buffers, inputs), labels)


@torch.inference_mode(mode=False)
def observe(
    model: nn.Module,
    images: Any,
    labels: Any,
    protocol: ClientStep,
    *,
    normalization: Normalization | None = None,
    reveal_labels: bool = True,
    training_mode: bool = False,
    loss: Loss = F.cross_entropy,
    generator: torch.Generator | None = None,
    vocabulary: Sequence[str] | None = None,
) -> Observation:
    """Run the client's step on its private images and return what the server sees of it.

    The model, its mode and its ``.grad`` are left as they were, and so is torch's global generator.

    Args:
        model: any `torch.nn.Module` that gives logits ``(N, classes)``, or a tuple, dict or object with them.
        images: ``(N, C, H, W)`` in [0, 1], or bytes; taken to the model's type. Or token sequences, whole
            numbers ``(N, T)``.
        labels: int64 ``(N,)``, or whatever the loss takes, ``(N, ...)``.
        protocol: `FedSGD`, `FedAvg` or a function with the same arguments; or `invlib.Defended`, which
            changes the update before the server sees it, and which the observation shows if it is public.
        normalization: how the client encodes its images; token sequences need none.
        reveal_labels: whether the server is told the labels.
        training_mode: whether the client runs the model in training mode; batch norm then uses the
            statistics of the batch, and the updated running statistics are sent as buffers.
        loss: the client's loss ``(logits, labels) -> scalar``.
        generator: its seed is that of the client's dropout and of a defence's noise; None takes one that no
            attack draws. Clients and rounds that draw for themselves need one each.
        vocabulary: of text, the word of each token, to print what is recovered.

    Raises:
        ObservationError: images or labels have the wrong shape, type or range, the loss does not take the
            labels, or the model has no trainable parameter.

    Taught in: chapter 1
    """
    model = unwrapped(model)
    trainable_parameters(model)
    tokens = as_tokens(images)
    if tokens is not None:
        inputs = placed(tokens, model)
    else:
        normalization = as_normalization(normalization)
        images = as_images(images, like(model))
        inputs = normalization.encode(images)
    count, shape = inputs.shape[0], tuple(inputs.shape[1:])
    labels = as_labels(labels, classes_only=loss is F.cross_entropy, text=tokens is not None)
    labels = labels.to(like(model)) if labels.is_floating_point() else labels.to(inputs.device)
    _check_batch(model, inputs, labels, loss)
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}

    def update_statistics(params: Mapping[str, Tensor], batch: Tensor) -> None:
        with torch.no_grad(), in_mode(model, training=True, track_statistics=True):
            forward(model, params, buffers, batch)

    seed = CLIENT_SEED if generator is None else generator.initial_seed()
    with in_mode(model, training=training_mode, seed=seed):
        client: Any = protocol.drawn(count) if hasattr(protocol, "drawn") else protocol
        update = undefended(client)(
            model,
            inputs,
            labels,
            buffers={name: b.clone() for name, b in buffers.items()},
            loss=loss,
            on_step=update_statistics if training_mode else None,
        )
    sent: Mapping[str, Tensor] = {}
    if hasattr(client, "release"):
        update = client.release(update, torch.Generator().manual_seed(seed))
    said: Any = protocol
    if not getattr(said, "public", True):
        protocol = said.client
    elif hasattr(said, "sent"):
        sent = said.sent(update)
    if lost := [name for name, value in update.items() if not torch.isfinite(value).all()]:
        raise ObservationError(
            f"the client's step gives NaN or infinite numbers, first in {lost[0]!r}; expected a model with "
            "finite weights and a loss that is finite on these images"
        )
    if not any(value.any() for value in update.values()):
        warnings.warn(
            "the client's update is all zero: its images do not show in it (a saturated loss, one class "
            "alone or an output without a graph)",
            DoubtWarning,
            stacklevel=2,
        )
    return Observation(
        update={name: value.detach() for name, value in update.items()},
        protocol=protocol,
        num_images=count,
        image_shape=shape,
        labels=labels.detach().clone() if reveal_labels else None,
        normalization=normalization,  # type: ignore[arg-type] # text may have none
        buffers=buffers,
        training_mode=training_mode,
        sent=sent,
        loss=loss,
        vocabulary=vocabulary,  # type: ignore[arg-type] # becomes a tuple
    )


def _check_batch(model: nn.Module, inputs: Tensor, labels: Tensor, loss: Loss) -> None:
    what = "images" if inputs.is_floating_point() else "token sequences"
    if labels.shape[0] != inputs.shape[0]:
        raise ObservationError(
            f"labels have shape {tuple(labels.shape)} for {inputs.shape[0]} {what}; expected one for each"
        )
    shape = tuple(inputs.shape[1:])
    classes = num_classes(model, shape)
    indices = labels.ndim == 1 and not labels.is_floating_point() and loss is F.cross_entropy
    if indices and not ((labels >= 0) & (labels < classes)).all():
        raise ObservationError(f"labels {labels.tolist()} are out of range; expected 0 to {classes - 1}")
    logits = like(model).new_zeros(inputs.shape[0], classes)
    if len(shape) == 1:  # a loss of text may take logits of each place, (N, T, classes)
        try:
            with torch.no_grad(), in_mode(model, training=False):
                logits = torch.zeros_like(logits_of(model(inputs)))
        except (IndexError, RuntimeError, ValueError) as error:
            raise ObservationError(
                f"the model does not run on tokens from {int(inputs.min())} to {int(inputs.max())}: {error}; "
                "expected numbers that its embedding has"
            ) from error
    check_loss(loss, logits, labels)


def check_loss(loss: Loss, logits: Tensor, labels: Tensor) -> None:
    """Call a loss once, on logits and labels of the client's shapes.

    Raises:
        ObservationError: it does not take them, or does not give one number.
    """
    try:
        value = loss(logits, labels)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ObservationError(
            f"the loss does not take logits {tuple(logits.shape)} and labels of shape "
            f"{tuple(labels.shape)} and type {labels.dtype}: {error}"
        ) from error
    if not isinstance(value, Tensor) or value.ndim != 0:
        raise ObservationError(
            f"the loss gives {getattr(value, 'shape', value)!r}; expected a tensor, one number"
        )
