"""Run a network and ask what it has, without changing it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from invlib.errors import ObservationError, RecoveryError


def classifier(model: nn.Module) -> tuple[str, str | None]:
    """Return the names of the weight and the bias (or None) of the last fully connected layer.

    Raises:
        RecoveryError: the model has no fully connected layer.

    Taught in: chapter 4
    """
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise RecoveryError(
            f"{type(model).__name__} has 0 fully connected layers (torch.nn.Linear); label inference "
            "reads the last one, so give the labels instead"
        )
    name, layer = linear[-1]
    prefix = f"{name}." if name else ""
    return f"{prefix}weight", f"{prefix}bias" if layer.bias is not None else None


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
    return probe(model, image_shape)[0]


# What each model that is still in use gave, by image and by the shapes of its parameters.
_PROBED: WeakKeyDictionary[nn.Module, dict[object, tuple[int, int]]] = WeakKeyDictionary()


def probe(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return how many logits the model gives for one image, and how many bytes its layers put out.

    The model runs once for each shape of image and of parameters; then the answer is remembered.

    Raises:
        ObservationError: the model cannot run on such an image, or gives no ``(N, classes)`` logits.
    """
    known = _PROBED.setdefault(model, {}) if isinstance(model, Hashable) else {}
    key = (tuple(image_shape), tuple((p.shape, p.dtype) for p in model.parameters()))
    if key not in known:
        known[key] = _probe(model, image_shape)
    return known[key]


def _probe(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    try:
        logits, calls = record_layers(model, torch.zeros(1, *image_shape))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ObservationError(
            f"the model does not run on an image of shape {tuple(image_shape)} (C, H, W): {error}"
        ) from error
    if logits.ndim != 2:
        raise ObservationError(f"the model gives shape {tuple(logits.shape)}; expected logits (N, classes)")
    outputs = [call.output for call in calls if isinstance(call.output, Tensor)]
    return int(logits.shape[1]), sum(output.nbytes for output in outputs)


def forward(
    model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None, inputs: Tensor
) -> Tensor:
    """Run the model with the given parameters and buffers in place of its own."""
    logits: Tensor = functional_call(model, {**params, **(buffers or {})}, (inputs,))
    return logits


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """One call of one layer of a network.

    Args:
        name: the layer's name in ``model.named_modules()``.
        layer: the layer.
        given: its first argument.
        output: what it returned.
    """

    name: str
    layer: nn.Module
    given: Any
    output: Any


def record_layers(
    model: nn.Module,
    inputs: Tensor,
    kinds: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
    *,
    params: Mapping[str, Tensor] | None = None,
    training: bool = False,
) -> tuple[Tensor, list[LayerCall]]:
    """Run a network once, without gradients, and note every call of its layers, in order.

    Args:
        model: the network; its hooks and modes are as before afterwards, also after an error.
        inputs: normalised images ``(N, C, H, W)``; taken to the device and type of the parameters.
        kinds: which types of layers to note; None notes every module that has no modules inside.
        params: parameters in place of the network's own.
        training: run in training mode, without writing batch-norm statistics.

    Returns:
        The output of the network and the calls; a layer that runs twice is noted twice.
    """
    calls: list[LayerCall] = []
    some = next(model.parameters(), None)
    inputs = inputs if some is None else inputs.to(some)

    def noted(name: str, layer: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next(iter((*args, *kwargs.values())), None)
            calls.append(LayerCall(name=name, layer=layer, given=given, output=output))

        return layer.register_forward_hook(hook, with_kwargs=True)

    handles = [
        noted(name, module)
        for name, module in model.named_modules()
        if (isinstance(module, kinds) if kinds is not None else not list(module.children()))
    ]
    try:
        with torch.no_grad(), in_mode(model, training=training):
            output = model(inputs) if params is None else forward(model, params, None, inputs)
            return output, calls
    finally:
        for handle in handles:
            handle.remove()


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


def tracks_statistics(model: nn.Module) -> bool:
    """Return whether the model has a batch-norm layer with running statistics."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(m.running_mean is not None for m in norms)
