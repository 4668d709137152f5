"""The client's own check: which of its images an update would give away, and by what."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.analytic import fully_connected
from invlib.attacks.base import Attack
from invlib.attacks.certificate import layer_of
from invlib.attacks.exact import exact_batch
from invlib.attacks.patches import patch_embedding
from invlib.attacks.recursive import recursive_inversion
from invlib.auditing.rows import Call, Found, Way, parallel_rows, ratio_to_mean, read_rows, scaled_class
from invlib.core.convert import as_images, as_tokens
from invlib.core.network import forward, in_mode, like, trainable_parameters, unwrapped
from invlib.core.normalization import Normalization
from invlib.core.observation import ClientStep, Loss, Observation
from invlib.errors import ConfigError, InvlibError, ObservationError, RecoveryError
from invlib.federated import FedSGD, observe
from invlib.metrics import psnr

Action = Literal["send", "drop", "refuse"]


@dataclass(frozen=True, kw_only=True)
class Presend:
    """What a client found before it sent an update. None of it is for the server.

    Args:
        leaks: bool ``(N,)``: images that can be read off the update.
        partly: bool ``(N,)``: images of which the features, or the gradient alone, can be.
        psnr: ``(N,)`` of the best that was read off, in dB; minus infinity where nothing was.
        ways: by what, the cheapest first.
        action: ``"refuse"`` where no image would be left or the network is made for it, ``"drop"`` where some
            are to be left out, else ``"send"``, which is no proof of safety: no search was run.
        numbers: ``images``, ``d_snr`` and ``gradient_db``, of the fully connected layers the most
            ``singletons`` (rows to which one image alone contributes) and ``parallel_rows``, ``class_scale``,
            and those of the ways, as far as they apply.
        notes: what was not looked at, and why.
        seconds: what it took.
    """

    leaks: Tensor
    partly: Tensor
    psnr: Tensor
    ways: tuple[Way, ...]
    action: Action
    numbers: Mapping[str, float | int]
    notes: tuple[str, ...]
    seconds: float

    @property
    def drop(self) -> tuple[int, ...]:
        """The images to leave out, counted from 0; check again, for others may stand alone without them."""
        alone = {k for way in self.ways if way.leak in ("image", "gradient") for k in way.images}
        return tuple(sorted(alone))

    def __str__(self) -> str:
        told = {
            "send": "no image was read off (no proof of safety: nothing was searched)",
            "drop": f"leave out image {', '.join(map(str, self.drop))} and check again",
            "refuse": "do not send it",
        }
        count, total = int(self.leaks.sum()), len(self.leaks)
        lines = [f"{self.action}: {told[self.action]}", f"{count} of {total} images can be read off"]
        lines += [f"  {way.leak}: {way.text}" for way in self.ways]
        lines += [", ".join(f"{name} {value:.4g}" for name, value in self.numbers.items()), *self.notes]
        return "\n".join(lines)


@torch.inference_mode(mode=False)
def presend(
    model: nn.Module,
    images: Any,
    labels: Any,
    client: ClientStep | None = None,
    *,
    normalization: Normalization | None = None,
    update: Observation | None = None,
    training_mode: bool = False,
    loss: Loss = F.cross_entropy,
    readable: float = 30.0,
    seconds: float = 10.0,
) -> Presend:
    r"""Say in seconds which of a client's own images an update would give away, before it is sent.

    The client knows its batch, so that it need not guess what an attacker could find: whatever single rows of
    fully connected layers say, their differences where rows are parallel, what comes out once those images
    are subtracted, and what the closed forms give, is compared with the images themselves. Thus it measures
    the leak and not the trick: a unit of an ordinary network that fired for one image leaks it as one that
    was made for it does. Two things are said of the network alone: rows of a layer that are all parallel,
    with biases of their own (imprint), and the weights of a class that are scaled (fishing).

    It also measures which share of the update is one image's own. D-SNR, the largest
    :math:`\|g_i\| / \sum_{j \ne i} \|g_j\|` over the weights of its layers, is given as a number and is no
    alarm: networks that have learned their images exceed 1 by themselves. A network trained to hide one image
    in a subspace that only its maker can read (SEER) is not found. Layers that are no `torch.nn.Linear` or
    run several times an image, convolutions say, are measured by their gradients alone.

    Args:
        model: as the client received it, before its step; it is not changed.
        images: the client's own, ``(N, C, H, W)`` in [0, 1], or bytes.
        labels: int64 ``(N,)``, or whatever the loss takes.
        client: its step, defences included; None is `invlib.FedSGD`.
        normalization: how it encodes its images.
        update: what is to leave, where it is known (of `invlib.record_client`, say); its client,
            normalization and mode are taken. None runs the client's step.
        training_mode: whether the client runs the model in training mode.
        loss: ``(logits, labels) -> scalar``.
        readable: from how many dB on something counts as read off: the PSNR of an image; how much farther
            features are from the batch's mean than from what was read; how much longer an image's gradient is
            than the rest of a layer's update.
        seconds: how long `invlib.exact_batch` may take at most.

    Raises:
        ObservationError: images, labels or the update do not fit the model or each other.
        ConfigError: no normalization, or a setting out of range.

    Source: imprint: Fowl et al. 2022, arXiv 2110.13057; traps: Boenisch et al. 2023; fishing: Wen et al.
    2022, arXiv 2202.00580; D-SNR: Garov et al. 2024 (SEER), arXiv 2306.03013; peeling: Shariati and
    Alambardar Meybodi 2026.
    """
    began = time.perf_counter()
    for name, value in (("readable", readable), ("seconds", seconds)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
            raise ConfigError(f"{name} is {value!r}; expected a number above 0")
    model = unwrapped(model)
    if as_tokens(images) is not None:
        raise ObservationError("images are token sequences; expected images (N, C, H, W)")
    if labels is None:
        raise ObservationError("labels are None; expected one for each image")
    if update is None:
        settings = {"normalization": normalization, "training_mode": training_mode, "loss": loss}
        seen = observe(model, images, labels, client or FedSGD(), **settings)  # type: ignore[arg-type]
    elif isinstance(update, Observation):
        seen = replace(update, labels=labels, loss=update.loss or loss)
    else:
        raise ObservationError(f"update is a {type(update).__name__}; expected an invlib.Observation")
    model = seen.validate(model)
    own = as_images(images, like(model))
    if own.shape != (seen.num_images, *seen.image_shape):
        expected = (seen.num_images, *seen.image_shape)
        raise ObservationError(f"images have shape {tuple(own.shape)}; expected {expected}, the update's")
    step = _step(model, seen, own)
    found = [_alone(model, seen, step, readable), scaled_class(model)]
    best = own.new_full((len(own),), -torch.inf, dtype=torch.float64)
    notes = []
    if seen.training_mode and len(own) > 1:
        notes.append(
            "training mode: an image's gradient is that of its own loss, with the others in the batch"
        )
    for name, call in step.calls.items():
        try:
            layer = layer_of(model, seen, name)
        except (RecoveryError, torch.linalg.LinAlgError) as error:
            notes.append(f"{name!r} was not read: {error}")
            continue
        found += [read_rows(seen, own, layer, call, readable, best), parallel_rows(layer, call)]
    if any(way.leak == "network" for some, _ in found for way in some):
        notes.append("the closed forms were not run, for the network is to be refused anyhow")
    else:
        found += _closed_forms(model, seen, own, step, readable, seconds, best, notes)
    ways = tuple(way for some, _ in found for way in some)
    numbers: dict[str, float | int] = {"images": len(own)}
    for _, more in found:
        numbers |= {name: value for name, value in more.items() if value > numbers.get(name, -1)}
    leaks, partly = (best >= readable).cpu(), torch.zeros(len(own), dtype=torch.bool)
    for way in ways:
        partly[list(way.images)] = True
    result = Presend(
        leaks=leaks,
        partly=partly & ~leaks,
        psnr=best.cpu(),
        ways=ways,
        action="send",
        numbers=numbers,
        notes=tuple(notes),
        seconds=time.perf_counter() - began,
    )
    if len(result.drop) == len(own) or any(way.leak == "network" for way in ways):
        return replace(result, action="refuse")
    return replace(result, action="drop") if result.drop else result


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """The client's first step, taken apart: what each image adds to the gradient, by its own loss.

    Args:
        calls: by name.
        parts: yields each image's gradient by parameter name.
        whole: their sum, as the mean over the batch that the client computes.
    """

    calls: dict[str, Call]
    parts: Callable[[], Iterator[dict[str, Tensor]]]
    whole: dict[str, Tensor]


def _step(model: nn.Module, seen: Observation, own: Tensor) -> _Step:
    inputs, labels = seen.normalization.encode(own), seen.labels
    assert labels is not None
    labels = labels.to(like(model)) if labels.is_floating_point() else labels.to(own.device)
    loss = seen.loss or F.cross_entropy
    params = {name: p.clone().requires_grad_() for name, p in trainable_parameters(model).items()}
    ran: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def noted(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            ran.setdefault(name, []).append((given[0], output))
            return output.clone()  # an activation may overwrite it

        return hook

    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    handles = [m.register_forward_hook(noted(name)) for name, m in modules.items()]
    try:
        with torch.enable_grad(), in_mode(model, training=seen.training_mode, seed=0):
            logits = forward(model, params, None, inputs)
    finally:
        for handle in handles:
            handle.remove()
    once = {name: some[0] for name, some in ran.items() if len(some) == 1 and some[0][0].ndim == 2}
    wanted = [*params.values(), *(output for _, output in once.values())]
    with torch.enable_grad():
        got = torch.autograd.grad(loss(logits, labels), wanted, retain_graph=True, materialize_grads=True)

    def parts() -> Iterator[dict[str, Tensor]]:
        for k in range(len(own)):
            with torch.enable_grad(), in_mode(model, training=seen.training_mode, seed=0):
                # Batch norm in training mode needs the others; else one image is run by itself.
                rows = (
                    logits[k : k + 1]
                    if seen.training_mode
                    else forward(model, params, None, inputs[k : k + 1])
                )
                value = loss(rows, labels[k : k + 1])
            grads = torch.autograd.grad(value, [*params.values()], retain_graph=True, materialize_grads=True)
            yield dict(zip(params, grads, strict=True))

    calls = {
        name: Call(layer=modules[name], inputs=given.detach().double(), signals=signal.double())
        for (name, (given, _)), signal in zip(once.items(), got[len(params) :], strict=True)
    }
    return _Step(calls=calls, parts=parts, whole=dict(zip(params, got, strict=False)))


def _alone(model: nn.Module, seen: Observation, step: _Step, readable: float) -> Found:
    """Measure which share of each layer's update is one image's own gradient."""
    count = seen.num_images
    matrices = [name for name, g in step.whole.items() if g.ndim > 1 and name not in seen.sent]
    if not matrices:
        return [], {}
    try:
        update = {name: seen.mean_gradient(name, model).to(step.whole[name]) for name in matrices}
    except InvlibError:  # of Adam, say: what it steps along is the gradient all the same
        update = step.whole
    sizes = torch.zeros(count, len(matrices), dtype=torch.float64)
    cosines = torch.zeros_like(sizes)
    for k, part in enumerate(step.parts()):
        for j, name in enumerate(matrices):
            sizes[k, j] = float(part[name].norm())
            cosines[k, j] = float(F.cosine_similarity(part[name].flatten(), update[name].flatten(), dim=0))
    ratios = torch.where(sizes > 0, sizes / (sizes.sum(0) - sizes).clamp_min(1e-300), 0)
    rest = (1 - cosines.clamp(0, 1).square()).clamp_min(1e-12).sqrt()
    where = int(rest.min(0).values.argmin())
    shown = -20 * rest.min(1).values.log10()
    numbers: dict[str, float | int] = {"gradient_db": float(shown.max())}
    if count > 1:
        numbers["d_snr"] = float(ratios.max())
    images = tuple((shown >= readable).nonzero().flatten().tolist())
    if not images:
        return [], numbers
    text = (
        f"the update of {matrices[where]!r} is the gradient of image {int(rest[:, where].argmin())} but for "
        f"{float(rest.min()):.1%} of its length: a search for it faces a batch of one"
    )
    return [
        Way(name="one image's gradient", leak="gradient", images=images, text=text, numbers=numbers)
    ], numbers


def _closed_forms(
    model: nn.Module,
    seen: Observation,
    own: Tensor,
    step: _Step,
    readable: float,
    seconds: float,
    best: Tensor,
    notes: list[str],
) -> list[Found]:
    """Run the attacks that need no search, as an attacker would, for the images that no row gave."""
    attacks: dict[str, Attack] = {
        "the equations of the layers": recursive_inversion(),
        "the lowest layer with a bias": fully_connected(),
        "the patch embedding": patch_embedding(),
    }
    if len(own) > 1:
        attacks = {"the rank and the zeros of a layer": exact_batch(seconds=seconds, search=None)}
    found: list[Found] = []
    for name, attack in attacks.items():
        if (best >= readable).all():
            break
        try:
            got = attack(model, seen)
        except (RecoveryError, torch.linalg.LinAlgError) as error:
            notes.append(f"{name}: {error}")
            continue
        if got.features is not None and len(got.features):
            for layer, call in step.calls.items():
                if call.inputs.shape[1] == got.features.shape[1]:
                    near = torch.cdist(call.inputs, got.features.double()).argmin(1)
                    shown = ratio_to_mean(call.inputs, got.features.double()[near])
                    found.append(_by(name, "features", shown, readable, f" of {layer!r}"))
        elif len(got.images):
            images = got.images.to(own)
            shown = torch.stack([psnr(image.expand_as(own), own) for image in images]).amax(0)
            best.copy_(torch.maximum(best, shown))
            found.append(_by(name, "image", shown, readable))
    return found


def _by(name: str, leak: Literal["image", "features"], shown: Tensor, readable: float, of: str = "") -> Found:
    images = tuple((shown >= readable).nonzero().flatten().tolist())
    if not images:
        return [], {}
    text = (
        f"{name}{of} give {len(images)} of {len(shown)} at {float(shown[list(images)].min()):.0f} dB and more"
    )
    return [Way(name=name, leak=leak, images=images, text=text, numbers={"read": len(images)})], {}
