"""A proof without the truth: what the server's own copy of a network sends back to one of its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from invlib.attacks.base import loss_of, of_classes
from invlib.attacks.chain import chain, not_linear, sent, undo
from invlib.attacks.directions import Span, decay_of
from invlib.core.network import (
    in_mode,
    like,
    logits_of,
    num_classes,
    record_layers,
)
from invlib.core.observation import Observation
from invlib.errors import RecoveryError
from invlib.federated import FedSGD

_TOLERANCE = 1e-6  # of the residual of a certified image; more where the update itself is rounded
_LOOSEST = 1e-2
_CLEAN = 1e-10  # of the residual of what is taken out of the gradient, of which an error stays in it
AT_ONCE = 512  # simulated images


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """The fully connected layer that a batch is read from.

    Args:
        name: the layer's, for messages.
        weight_gradient: ``(m, d)``, up to a factor, float64.
        bias_gradient: ``(m,)``, or None.
        bias_name: of the parameter; None where there is no bias.
        module: the layer, where it is a module.
        image_of: takes one input ``(d,)`` to the normalised image, flat; None where the layer sees features.
        in_range: says of inputs ``(K, d)`` which may be an image's, bool ``(K,)``.
        share: of two classes, of what an image's weight has to be a multiple: all inputs for which the same
            units fire have one signal but for its length. None of more classes.
        decay: what multiple of the weight was in its gradient, and is taken out.
    """

    name: str
    weight_gradient: Tensor
    bias_gradient: Tensor | None
    bias_name: str | None
    module: nn.Linear | None
    image_of: Callable[[Tensor], Tensor] | None
    in_range: Callable[[Tensor], Tensor]
    share: float | None = None
    decay: float = 0.0


Signals = Callable[[Tensor], Tensor]  # inputs (M, d) -> the layer's signals for every label (M, L, m)


def layer_of(model: nn.Module, observation: Observation, name: str | None) -> Layer:
    """Return the fully connected layer to read a batch from: the named one, or the first.

    Raises:
        RecoveryError: there is none, or it was not sent.
    """
    if why := not_linear(observation):
        raise RecoveryError(f"{why}; expected a client of SGD")
    stages = chain(model, observation)
    first = stages.stages[0] if stages.stages and stages.stages[0].window is None else None
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if first is not None and name in (None, first.name):

        def image_of(inputs: Tensor) -> Tensor:
            return undo(stages.first, inputs)[0]

        def in_box(inputs: Tensor) -> Tensor:
            rows = torch.stack([image_of(row) for row in inputs]).view(-1, *observation.image_shape)
            images = observation.normalization.decode(rows)
            return ((images > -1e-3) & (images < 1 + 1e-3)).flatten(1).all(1)

        layer = Layer(
            name=first.name,
            weight_gradient=first.gradient(_gradient(model, observation, first.weight_name)),
            bias_gradient=None
            if first.bias_name is None
            else _gradient(model, observation, first.bias_name).flatten(),
            bias_name=first.bias_name,
            module=modules.get(first.name),
            image_of=image_of,
            in_range=in_box,
        )
        return _without_decay(layer, first.weight, first.bias, observation.num_images)
    probe = torch.zeros(1, *observation.image_shape)
    _, calls = record_layers(model, probe, nn.Linear)
    names = [call.name for call in calls if call.given.ndim == 2]
    if not names or name not in (None, *names):
        known = ", ".join(map(repr, names)) or "none"
        raise RecoveryError(
            f"{name!r} is no fully connected layer that {type(model).__name__} runs once an image; "
            f"expected one of: {known}"
        )
    chosen = name or names[0]
    module = modules[chosen]
    bias = f"{chosen}.bias" if module.bias is not None else None
    layer = Layer(
        name=chosen,
        weight_gradient=_gradient(model, observation, f"{chosen}.weight"),
        bias_gradient=None if bias is None else _gradient(model, observation, bias),
        bias_name=bias,
        module=module,
        image_of=None,
        in_range=lambda inputs: (inputs > -1e-6 * inputs.abs().amax(1, keepdim=True)).all(1),
    )
    return _without_decay(layer, module.weight, module.bias, observation.num_images)


def _without_decay(layer: Layer, weight: Tensor, bias: Tensor | None, expected: int) -> Layer:
    decay = decay_of(layer.weight_gradient, weight, expected=expected)
    if not decay:
        return layer
    shift = layer.bias_gradient
    if shift is not None and bias is not None:
        shift = shift - decay * bias.detach().flatten().double()
    left = layer.weight_gradient - decay * weight.detach().double()
    return replace(layer, weight_gradient=left, bias_gradient=shift, decay=decay)


def _gradient(model: nn.Module, observation: Observation, name: str) -> Tensor:
    """Return a gradient in double precision; a step that does not say its factor is tried on noise."""
    raw = sent(observation, name)
    if hasattr(observation.protocol, "mean_gradient"):
        return observation.mean_gradient(name, model).to(raw).double()
    count, labels = observation.num_images, observation.labels
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(count, *observation.image_shape, generator=generator).to(like(model))
    labels = torch.zeros(count, dtype=torch.long) if labels is None else labels
    labels = labels.to(noise) if labels.is_floating_point() else labels.to(noise.device)
    loss = loss_of(F.cross_entropy, observation)
    with in_mode(model, training=False):  # the difference of two steps is free of weight decay
        own, slope = (
            (step(model, noise, labels, loss=loss)[name] - step(model, 1 - noise, labels, loss=loss)[name])
            .detach()
            .double()
            for step in (observation.protocol, FedSGD())
        )
    return raw.double() / (float((own * slope).sum() / slope.square().sum().clamp_min(1e-300)) or 1.0)


def targets_of(model: nn.Module, observation: Observation) -> Tensor:
    """Return the labels that an image may have: those that were told, each once, or all classes."""
    if observation.labels is not None:
        told: Tensor = observation.labels.unique(dim=0)
        return told
    if not of_classes(model, observation):
        raise RecoveryError(
            "the labels are hidden and no classes, so that they cannot all be tried; expected labels"
        )
    return torch.arange(num_classes(model, observation.image_shape))


def signals_of(model: nn.Module, observation: Observation, layer: Layer, targets: Tensor) -> Signals:
    """Return a function that runs the server's copy: what each input sends back to the layer for each label.

    It takes inputs ``(M, d)`` and returns ``(M, L, m)`` in double precision, gradients of the loss of one
    image at the layer's output, in evaluation mode.

    Raises:
        RecoveryError: the layer has no bias and is no module, or the network cannot run on several images at
            once under `torch.func.vmap`.
    """
    if layer.module is None and layer.bias_name is None:
        raise RecoveryError(
            f"{layer.name!r} has no bias and is no torch.nn.Linear, so that its signals cannot be computed; "
            "expected one of the two"
        )
    loss = loss_of(F.cross_entropy, observation)
    params = {n: p.detach().double() for n, p in model.named_parameters()}
    buffers = {n: b.detach() for n, b in model.named_buffers()}
    buffers = {n: b.double() if b.is_floating_point() else b for n, b in buffers.items()}
    targets = targets.double() if targets.is_floating_point() else targets
    targets = targets.to(layer.weight_gradient.device)
    units = len(layer.weight_gradient)
    swapped: dict[str, Tensor] = {}

    def swap(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (swapped["inputs"],) if "inputs" in swapped else None

    def add(_: nn.Module, args: object, output: Tensor) -> Tensor:
        return output + swapped["shift"]

    def one(inputs: Tensor, target: Tensor) -> Tensor:
        def cost(shift: Tensor) -> Tensor:
            own = dict(params)
            if layer.bias_name is not None:
                own[layer.bias_name] = own[layer.bias_name] + shift.view(own[layer.bias_name].shape)
            swapped["shift"] = shift
            if layer.image_of is None:
                swapped["inputs"], image = inputs[None], inputs.new_zeros(1, *observation.image_shape)
            else:
                image = layer.image_of(inputs).view(1, *observation.image_shape)
            return loss(logits_of(functional_call(model, {**own, **buffers}, (image,))), target[None])

        slope: Tensor = grad(cost)(inputs.new_zeros(units))
        return slope

    every = vmap(vmap(one, (None, 0)), (0, None))

    def signals(inputs: Tensor) -> Tensor:
        handles = []
        if layer.module is not None and layer.image_of is None:
            handles.append(layer.module.register_forward_pre_hook(swap))
        if layer.module is not None and layer.bias_name is None:
            handles.append(layer.module.register_forward_hook(add))
        try:
            with torch.enable_grad(), in_mode(model, training=False):
                parts = [every(part, targets) for part in inputs.split(max(1, AT_ONCE // len(targets)))]
        except RuntimeError as error:  # .item() or control flow on data, say
            raise RecoveryError(
                f"the network does not run under torch.func.vmap, by which signals are computed: {error}"
            ) from error
        finally:
            swapped.clear()
            for handle in handles:
                handle.remove()
        return torch.cat(parts).detach() if parts else inputs.new_zeros(0, len(targets), units)

    return signals


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Inputs of a layer and what proves them.

    Args:
        inputs: ``(M, d)`` float64.
        labels: ``(M,)``, which of the targets each has.
        residuals: ``(M,)``, distance of the network's signal and the update's, both of length one.
        certified: ``(M,)``, whether that is rounding.
        clean: ``(M,)``, of those, which are as exact as the gradient is, so that they can be taken out of it.
        weights: ``(M,)``, the share of the batch that each is, where the update's factor is known.
        story: how they were found, in clauses.
    """

    inputs: Tensor
    labels: Tensor
    residuals: Tensor
    certified: Tensor
    clean: Tensor
    weights: Tensor
    story: tuple[str, ...] = ()

    def only(self, rows: Tensor) -> Found:
        """Return those of some rows, or of a mask."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _EACH})


_EACH = tuple(f.name for f in fields(Found) if f.name != "story")


def joined(parts: list[Found]) -> Found:
    """Return all that was found, and how."""
    together = {name: torch.cat([getattr(part, name) for part in parts]) for name in _EACH}
    return Found(**together, story=tuple(dict.fromkeys(clause for part in parts for clause in part.story)))


def certified(span: Span, signals: Signals, inputs: Tensor, share: float | None = None) -> Found:
    r"""Say of any inputs whether they are the client's: by the signal's residual in the column space.

    What the network sends back for an input x of the batch and its label, :math:`\delta`, lies in it: of m
    numbers only r are free. Its weight w is what lowers the rank of :math:`G - w\,\delta\,x^\top`, which is
    :math:`1 / (x^\top G^+ \delta)`; of the wrong one of two classes it is negative.

    Args:
        span: of the weight gradient.
        signals: the server's copy of the network.
        inputs: ``(M, d)``, of the row space of the gradient.
        share: of what weights have to be multiples, see `Layer`.

    Source: the span check of Petrov et al. 2024 (DAGER), arXiv 2405.15586, for signals; the rank: Wedderburn.
    """
    back = signals(inputs)
    along = back @ span.columns
    length = back.norm(dim=2)
    left = (back - along @ span.columns.T).norm(dim=2) / length.clamp_min(1e-300)
    inverse = (along * (inputs @ span.core.T / span.core.square().sum(1))[:, None]).sum(2)
    left = torch.where((inverse > 0) & (length > 0), left, torch.ones_like(left))
    labels = left.argmin(1)
    rows = torch.arange(len(inputs), device=labels.device)
    own, weights = back[rows, labels], inverse[rows, labels].reciprocal()
    return judged(span, inputs, own.T, labels, left[rows, labels], weights, share)


def accounted(layer: Layer, span: Span, signals: Signals, found: Found, count: int) -> Found:
    """Withdraw the proof of inputs with a weight that no images have, in one gradient of a mean over a batch.

    Mixtures of images for which the same units fire have signals in the column space where there are few
    classes. An image's weight is one in ``count``, or all inputs together make up the gradient.
    """
    columns = signals(found.inputs)[torch.arange(len(found.inputs)), found.labels].T * found.weights
    gap = (layer.weight_gradient - columns @ found.inputs).norm() / layer.weight_gradient.norm()
    tolerance = (100 * span.noise.max()).clamp(100 * _TOLERANCE, _LOOSEST)
    fair = (found.weights * count - 1).abs() <= tolerance
    return replace(found, certified=found.certified & (fair | (gap <= 10 * _TOLERANCE)))


def judged(
    span: Span,
    inputs: Tensor,
    columns: Tensor,
    labels: Tensor,
    residuals: Tensor,
    weights: Tensor,
    share: float | None,
) -> Found:
    """Say which residuals are rounding, by the noise of the directions of columns of D ``(m, M)``."""
    noise = 10 * (F.normalize(columns.T @ span.columns) * span.noise).norm(dim=1)
    tolerance = noise.clamp(_TOLERANCE, _LOOSEST)
    sure = residuals <= tolerance
    if share is not None:  # weights are those of one image, or of some that are the same
        times = weights / share
        sure &= (times > 0.5) & ((times - times.round()).abs() <= tolerance)
    return Found(
        inputs=inputs,
        labels=labels,
        residuals=residuals,
        certified=sure,
        clean=sure & (residuals <= noise.clamp(_CLEAN, _LOOSEST)),
        weights=weights,
    )
