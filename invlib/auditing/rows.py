"""What rows of fully connected layers say of images, and layers that were made to say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from invlib.attacks.certificate import Layer
from invlib.core.network import classifier
from invlib.core.observation import Observation
from invlib.errors import RecoveryError
from invlib.metrics import psnr

_PARALLEL = 0.999  # cosine from which rows are parallel
_ROWS = 4  # parallel rows with biases of their own that no training makes
_COMPARED = 4096  # rows of a layer that are compared with one another
_SCALED = 4.0  # times the median length of the class weights
_EXACT = 60.0  # dB from which an attacker can prove what is read, and take it out of the update
_AT_ONCE = 1024  # rows that are compared with the images


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way in which an update gives something away.

    Args:
        name: of the way, short.
        leak: what is given away: the ``"image"`` itself; its ``"features"`` behind other layers; its
            ``"gradient"``, all but alone in the update, so that a search faces a batch of one. Or
            ``"network"``: no image, but weights that no training makes, and that single images out.
        images: which, counted from 0.
        text: what was seen, with numbers.
        numbers: the same, by name.
    """

    name: str
    leak: Literal["image", "features", "gradient", "network"]
    images: tuple[int, ...]
    text: str
    numbers: Mapping[str, float | int]


Found = tuple[list[Way], dict[str, float | int]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """A fully connected layer that ran once an image.

    Args:
        layer: the module.
        inputs: ``(N, d)`` float64.
        signals: ``(N, m)`` float64, the gradient of the whole loss at its output.
    """

    layer: nn.Linear
    inputs: Tensor
    signals: Tensor


def scaled_class(model: nn.Module) -> Found:
    """Compare the weights of the classes: fishing scales those of one of them."""
    try:
        rows = dict(model.named_parameters())[classifier(model)[0]].detach().flatten(1).norm(dim=1)
    except RecoveryError:
        return [], {}
    if len(rows) < 3:
        return [], {}
    scale = float(rows.max() / rows.median().clamp_min(1e-30))
    numbers: dict[str, float | int] = {"class_scale": scale}
    if scale < _SCALED:
        return [], numbers
    text = (
        f"the weights of class {int(rows.argmax())} are {scale:.3g} times as long as those of the others: an "
        "image of it drowns all others (fishing)"
    )
    return [Way(name="scaled class", leak="network", images=(), text=text, numbers=numbers)], numbers


def parallel_rows(layer: Layer, call: Call) -> Found:
    """Count parallel rows with biases of their own, whose differences single images out."""
    count = int(torch.cat(_neighbours(call.layer)).unique().numel())
    numbers: dict[str, float | int] = {"parallel_rows": count}
    if count < _ROWS or call.inputs.shape[1] < _ROWS:
        return [], numbers
    text = (
        f"{count} of {len(call.layer.weight)} rows of {layer.name!r} are parallel, with biases of their own: "
        "the differences of neighbours single images out (imprint)"
    )
    return [Way(name="parallel rows", leak="network", images=(), text=text, numbers=numbers)], numbers


def _neighbours(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return pairs of parallel rows ``(K,)``, ``(K,)`` of which the second is the next to begin to fire."""
    weight, none = layer.weight.detach(), torch.zeros(0, dtype=torch.int64, device=layer.weight.device)
    size = weight.norm(dim=1)
    rows = (size > 1e-12).nonzero().flatten()[:_COMPARED]
    if layer.bias is None or not len(rows):
        return none, none
    unit = weight[rows] / size[rows, None]
    group = (unit @ unit.T > _PARALLEL).to(torch.uint8).argmax(1)  # the first row that each is parallel to
    begins = -layer.bias.detach()[rows] / size[rows]
    order = begins.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    lower, upper = order[:-1], order[1:]
    pair = (group[lower] == group[upper]) & (begins[upper] > begins[lower])
    return rows[lower[pair]], rows[upper[pair]]


def read_rows(
    seen: Observation, own: Tensor, layer: Layer, call: Call, readable: float, best: Tensor
) -> Found:
    """Read single rows, and differences of parallel ones; then again without what came out exactly.

    What is read of images is entered in ``best`` ``(N,)``, in dB.
    """
    weight, bias = layer.weight_gradient, layer.bias_gradient
    pairs = _neighbours(call.layer)
    simulated = call.signals.T @ call.inputs
    factor = float((weight * simulated).sum() / simulated.square().sum().clamp_min(1e-300))
    shown = torch.full_like(best, -torch.inf)
    least = 0.0 if bias is None else 1e-6 * float(bias.abs().max())
    taken = torch.zeros_like(best, dtype=torch.bool)
    alone, exact = taken, ~taken
    while exact.any() and not taken.all():
        read = _read(weight, bias, pairs, call.inputs, least)
        score = _decibels(seen, own, layer, call, read)
        shown = torch.where(taken, shown, torch.maximum(shown, score))
        alone = alone if taken.any() else shown >= readable
        exact = (score >= _EXACT) & ~taken
        taken |= exact
        columns = factor * call.signals[exact].T
        weight = weight - columns @ read[exact]
        bias = None if bias is None else bias - columns.sum(1)
    known = shown >= readable
    singles = int(((call.signals != 0).sum(0) == 1).sum())
    numbers: dict[str, float | int] = {"singletons": singles}
    if layer.image_of is not None:
        best.copy_(torch.maximum(best, shown))
    if not known.any():
        return [], numbers
    images = tuple(known.nonzero().flatten().tolist())
    peeled = int((known & ~alone).sum())
    leak: Literal["image", "features"] = "features" if layer.image_of is None else "image"
    what = "images" if leak == "image" else "images' features"
    text = (
        f"{len(images)} of {len(own)} {what} are read off rows of {layer.name!r} at "
        f"{float(shown[known].min()):.0f} dB and more, {peeled} of them once others are subtracted; "
        f"{singles} of its {len(weight)} rows are of one image alone"
    )
    numbers |= {"read": len(images), "peeled": peeled, "rows": len(weight)}
    return [Way(name=f"rows of {layer.name}", leak=leak, images=images, text=text, numbers=numbers)], numbers


def _read(
    weight: Tensor, bias: Tensor | None, pairs: tuple[Tensor, Tensor], inputs: Tensor, least: float
) -> Tensor:
    """Return what rows and differences of pairs of them say, the nearest to each of the inputs ``(N, d)``.

    Without a bias a row says an input up to a factor, which is the best one; ``least`` is rounding.
    """
    nearest = inputs.new_full((len(inputs),), torch.inf)
    read, square = torch.zeros_like(inputs), inputs.square().sum(1)
    one, other = pairs
    rows = torch.cat([weight, weight[one] - weight[other]])
    shift = None if bias is None else torch.cat([bias, bias[one] - bias[other]])
    kept = (rows.any(1) if shift is None else shift.abs() > least).nonzero().flatten()
    for k in kept.split(_AT_ONCE) if len(kept) else ():
        some = rows[k] if shift is None else rows[k] / shift[k, None]
        along, size = inputs @ some.T, some.square().sum(1)
        times = along / size if shift is None else torch.ones_like(along)
        gaps = (times.square() * size - 2 * times * along + square[:, None]).min(1)
        closer = gaps.values < nearest
        at = gaps.indices[closer]
        read[closer] = times[closer, at][:, None] * some[at]
        nearest = torch.minimum(nearest, gaps.values)
    return read


def _decibels(seen: Observation, own: Tensor, layer: Layer, call: Call, read: Tensor) -> Tensor:
    """Return of inputs ``(N, d)`` that were read how near they are to the client's, in dB."""
    if layer.image_of is None:
        return ratio_to_mean(call.inputs, read)
    rows = torch.stack([layer.image_of(row) for row in read]).view(own.shape)
    return psnr(seen.normalization.decode(rows).clamp(0, 1), own)


def ratio_to_mean(inputs: Tensor, read: Tensor) -> Tensor:
    """Return how far inputs are from their mean, over how far from them is what was read, in dB."""
    wide = (inputs - inputs.mean(0) if len(inputs) > 1 else inputs).norm(dim=1)
    times: Tensor = wide.clamp_min(1e-300) / (read - inputs).norm(dim=1).clamp_min(1e-300)
    return 20 * times.log10()
