"""Run a network and ask what it has, without changing it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from invlib.errors import DoubtWarning, InvlibError, ObservationError, RecoveryError


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside `torch.nn.DataParallel`, `torch.compile`, Opacus and the like.

    Raises:
        ObservationError: it is no module, or one that cannot be run with other parameters than its own:
            scripted or traced, quantised, lazy and not yet run, or on the meta device.
    """
    while isinstance(model, nn.Module) and (inner := _inside(model)) is not None:
        model = inner
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ObservationError(f"the model is {what}; expected an instance of torch.nn.Module")
    for name, module in model.named_modules():
        where = f"the model's module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ObservationError(
                f"{where} is scripted or traced; expected the module that it was made from"
            )
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise ObservationError(
                f"{where} is quantised, {type(module).__name__}, and has no gradient; "
                "expected the network that it was made from"
            )
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(p):
            raise ObservationError(
                f"{name!r} of the model is lazy; expected a model that ran on an image once"
            )
        if p.is_meta:
            raise ObservationError(f"{name!r} of the model is on the meta device; expected one with numbers")
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    """Return what a wrapper runs; None where the module is no wrapper."""
    if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
        found: nn.Module = model.module
        return found
    names = {kind.__name__ for kind in type(model).__mro__}
    inner = "_orig_mod" if "OptimizedModule" in names else "_module"
    if names & {"OptimizedModule", "AbstractGradSampleModule"}:
        found = getattr(model, inner)
        return found
    return None


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a network returned: a tensor, or an object, dict or tuple that has them.

    They are ``.logits``, the entry ``"logits"``, ``"out"`` or the only one, or the first of a tuple.

    Raises:
        ObservationError: there are none.
    """
    found = output
    if isinstance(found, Mapping):
        only = next(iter(found.values())) if len(found) == 1 else None
        found = found.get("logits", found.get("out", only))
    elif not isinstance(found, Tensor) and hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise ObservationError(
            f"the model gives a {type(output).__name__}; expected logits (N, classes), or a tuple, a dict or "
            "an object that has them first, as 'logits' or as .logits"
        )
    return found


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


def num_classes(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Return how many logits the model gives for one image ``(C, H, W)`` or one token sequence ``(T,)``.

    Raises:
        ObservationError: the model cannot run on such an image, or gives no ``(N, classes)`` logits.
    """
    return probe(model, image_shape)[0]


# What each model that is still in use gave, by image and by the shapes of its parameters.
_PROBED: WeakKeyDictionary[nn.Module, dict[object, tuple[int, int]]] = WeakKeyDictionary()
_RANDOM: WeakKeyDictionary[nn.Module, dict[object, bool]] = WeakKeyDictionary()


def probe(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[int, int]:
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


def _probe(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[int, int]:
    text = len(image_shape) == 1
    try:
        logits, calls = record_layers(model, blank(image_shape))
    except (InvlibError, MemoryError):
        raise
    except Exception as error:  # the model's own code may raise anything
        raise ObservationError(
            f"the model does not run on {'token sequences' if text else 'an image'} of shape "
            f"{tuple(image_shape)} {'(T,)' if text else '(C, H, W)'}: {type(error).__name__}: {error}"
        ) from error
    if (logits.ndim != 2 and not text) or logits.ndim == 0 or not logits.is_floating_point():
        raise ObservationError(
            f"the model gives shape {tuple(logits.shape)} and type {logits.dtype}; "
            "expected logits (N, classes)"
        )
    outputs = [call.output for call in calls if isinstance(call.output, Tensor)]
    return int(logits.shape[-1]), sum(output.nbytes for output in outputs)


def forward(
    model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None, inputs: Tensor
) -> Tensor:
    """Run the model with the given parameters and buffers in place of its own."""
    return logits_of(functional_call(model, {**params, **(buffers or {})}, (inputs,)))


def like(model: nn.Module) -> Tensor:
    """Return a tensor of the type in which the model computes, on its device: a parameter that is trained."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    return next(
        (p for p in floating if p.requires_grad), floating[0] if floating else torch.empty(0)
    ).detach()


def blank(shape: tuple[int, ...], count: int = 1) -> Tensor:
    """Return black images ``(count, C, H, W)``, or, for ``(T,)``, token sequences of zeros, int64."""
    return torch.zeros(count, *shape, dtype=torch.int64 if len(shape) == 1 else torch.float32)


def placed(inputs: Tensor, model: nn.Module) -> Tensor:
    """Return inputs on the model's device and, unless they are whole numbers, in its type."""
    some = like(model)
    return inputs.to(some) if inputs.is_floating_point() else inputs.to(some.device)


def is_random(model: nn.Module, shape: tuple[int, ...], *, training: bool, count: int = 2) -> bool:
    """Say whether the model gives something else each time for the same inputs ``(count, *shape)``."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    images = placed(images if len(shape) > 1 else blank(shape, count), model)

    def logits() -> Tensor:
        return forward(model, params, {name: b.clone() for name, b in model.named_buffers()}, images)

    known = _RANDOM.setdefault(model, {}) if isinstance(model, Hashable) else {}
    key = (tuple(shape), training, count)
    if key not in known:
        try:
            with torch.no_grad(), in_mode(model, training=training, seed=0):
                known[key] = not torch.allclose(logits(), logits(), rtol=1e-3, atol=0, equal_nan=True)
        except (RuntimeError, ValueError):  # batch norm does not run on one value a channel
            known[key] = False
    return known[key]


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
        inputs: normalised images ``(N, C, H, W)``, taken to the device and type of the parameters, or
            tokens int64 ``(N, T)``.
        kinds: which types of layers to note; None notes every module that has no modules inside.
        params: parameters in place of the network's own.
        training: run in training mode, without writing batch-norm statistics.

    Returns:
        The output of the network and the calls; a layer that runs twice is noted twice.
    """
    calls: list[LayerCall] = []
    inputs = placed(inputs, model)

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
            return logits_of(output), calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_mode(
    model: nn.Module, *, training: bool, track_statistics: bool = False, seed: int | None = None
) -> Iterator[None]:
    """Put the model in the state in which a client's step, simulated or attacked, can run; then put it back.

    Batch norm in training mode would write its running statistics into the model's buffers at every
    forward pass, which neither a simulated client nor an attack may do: they are off unless asked for.
    Dropout draws from torch's global generator, whose state is put back too. Attention runs in torch's plain
    form, which alone has a second derivative, and nothing is compiled. Hooks on the backward pass, which
    `torch.func` does not run, are off.

    Args:
        model: the network, unwrapped.
        training: the client's mode.
        track_statistics: let batch norm write its statistics.
        seed: of what dropout draws; None draws from where the global generator is.
    """
    modules = list(model.modules())
    modes = [(m.training, getattr(m, "track_running_stats", None)) for m in modules]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        model.train(training)
        for m in modules:
            if training and isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.track_running_stats = track_statistics and m.running_mean is not None
        with (
            torch.random.fork_rng(sorted(devices)),
            sdpa_kernel(SDPBackend.MATH),
            torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext(),
            _without_backward_hooks(model),
        ):
            if seed is not None:
                torch.manual_seed(seed)
            yield
    finally:
        for m, (mode, tracking) in zip(modules, modes, strict=True):
            m.training = mode
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.track_running_stats = bool(tracking)


@contextmanager
def _without_backward_hooks(model: nn.Module) -> Iterator[None]:
    """Take off the hooks of the backward pass, and Opacus's of the forward pass, for a while."""
    kept = []
    for name, m in model.named_modules():
        gone = [hooks for hooks in (m._backward_hooks, m._backward_pre_hooks) if hooks]
        foreign = {k: h for k, h in m._forward_hooks.items() if _module_of(h).startswith("opacus")}
        if gone and not foreign:
            warnings.warn(
                f"the model's module {name!r} has hooks on its backward pass, which are not run here; "
                "if they change gradients, put what they do into the client's step",
                DoubtWarning,
                stacklevel=4,
            )
        if gone or foreign:
            kept.append((m, dict(m._backward_hooks), dict(m._backward_pre_hooks), dict(m._forward_hooks)))
            m._backward_hooks.clear()
            m._backward_pre_hooks.clear()
            for k in foreign:
                del m._forward_hooks[k]
    try:
        yield
    finally:
        for m, backward, before, ahead in kept:
            m._backward_hooks.update(backward)
            m._backward_pre_hooks.update(before)
            m._forward_hooks.clear()
            m._forward_hooks.update(ahead)


def _module_of(hook: Any) -> str:
    return str(getattr(getattr(hook, "func", hook), "__module__", ""))


def tracks_statistics(model: nn.Module) -> bool:
    """Return whether the model has a batch-norm layer with running statistics."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(m.running_mean is not None for m in norms)
