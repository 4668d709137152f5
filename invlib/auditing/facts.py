"""What is measured on an update alone: its numbers, sums and ranks that a client's step cannot have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.directions import span_of
from invlib.attacks.lastlayer import Head
from invlib.attacks.losses import balanced
from invlib.attacks.saturation import head_slopes
from invlib.core.network import blank, like, num_classes, record_layers, trainable_parameters
from invlib.core.observation import Observation, undefended
from invlib.defenses import Clip
from invlib.errors import InvlibError, RecoveryError
from invlib.federated import FedSGD

Grid = Literal["bfloat16", "float16", "float32"]
_GRIDS: tuple[tuple[Grid, torch.dtype], ...] = (
    ("bfloat16", torch.bfloat16),
    ("float16", torch.float16),
    ("float32", torch.float32),
)
_MANY = 64  # numbers of a tensor, from which on their levels are looked at
_ENOUGH, _ALL = 1024, 128  # numbers of a tensor and of the update, likewise for how small they get
_LOOKED_AT = 65_536  # of a tensor's numbers, in search of levels
_LEVELS = 256  # as many as 8 bits tell apart
_THRESHOLD, _SCATTERED = 0.1, 0.05
_CLEAR = 8.0  # standard errors by which a gradient stands out from independent numbers
_FALL = 100.0  # by which singular values fall behind the last that is no rounding


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The numbers of an update, all tensors together.

    Args:
        count: how many there are.
        zeros: the share that is exactly zero or was not sent.
        scattered: the share of zeros in rows and columns that are not zero as a whole, as a layer of silent
            units leaves none.
        threshold: the smallest magnitude over the median one, of those that are not zero: about one over
            their number where none were left out.
        levels: how many magnitudes besides zero one tensor has at most, of those with many numbers.
        quantised: whether the magnitudes of each tensor have so few levels that a byte would hold them.
        grid: the coarsest type that holds them all exactly, coarser than their own; None where none does.
        empty: names of the tensors that are all zero.
        norm: the length of the update.
        relative: that over the length of the weights.
        along: the cosine of the update and the weights.
        equal: whether all numbers are the same.
    """

    count: int
    zeros: float
    scattered: float
    threshold: float
    levels: int
    quantised: bool
    grid: Grid | None
    empty: tuple[str, ...]
    norm: float
    relative: float
    along: float
    equal: bool

    @property
    def sparse(self) -> bool:
        """Whether the smallest numbers were left out."""
        return self.threshold > _THRESHOLD and self.scattered > _SCATTERED

    @property
    def used(self) -> int:
        """How many are not zero."""
        return round(self.count * (1 - self.zeros))


def numbers_of(model: nn.Module, observation: Observation) -> Numbers:
    """Measure the numbers of an update that fits the model."""
    own, update = trainable_parameters(model), observation.update
    linear = getattr(observation.protocol, "linear", True)  # Adam makes all numbers about as large
    flat = {name: value.detach().flatten() for name, value in update.items()}
    some = [value[value != 0].abs() for value in flat.values()]
    whole = torch.cat([value.double().cpu() for value in flat.values()])
    weights = torch.cat([own[name].detach().flatten().double().cpu() for name in flat])
    used = whole[whole != 0].abs()
    many = [value[:_LOOKED_AT] for value in some if len(value) >= _MANY]
    levels = [len(value.unique()) for value in many]
    norm, length = float(whole.norm()), float(weights.norm())
    return Numbers(
        count=len(whole),
        zeros=1 - len(used) / max(1, len(whole)),
        scattered=_scattered(update),
        threshold=max(_threshold(used, _ALL), *(_threshold(value, _ENOUGH) for value in some))
        if linear
        else 0.0,
        levels=max(levels, default=0),
        quantised=bool(levels)
        and all(n <= (min(_LEVELS, len(v) // 4) if linear else 1) for n, v in zip(levels, many, strict=True)),
        grid=_grid(used, next(iter(update.values())).dtype),
        empty=tuple(name for name, value in flat.items() if not value.any()),
        norm=norm,
        relative=norm / length if length else math.inf,
        along=float(whole @ weights) / (norm * length) if norm and length else 0.0,
        equal=len(whole) > 1 and bool((whole == whole[0]).all()) and norm > 0,
    )


def _threshold(magnitudes: Tensor, least: int) -> float:
    """Return the smallest magnitude over the median one; 0 of few numbers or few levels."""
    if len(magnitudes) < least or len(magnitudes[:_LOOKED_AT].unique()) < least // 2:
        return 0.0
    return float(magnitudes.min() / magnitudes.median())


def _scattered(update: Mapping[str, Tensor]) -> float:
    zeros = places = 0
    for value in update.values():
        if value.ndim < 2:
            continue
        alive = value.flatten(1) != 0
        alive = alive[alive.any(1)][:, alive.any(0)]
        zeros, places = zeros + int((~alive).sum()), places + alive.numel()
    return zeros / places if places else 0.0


def _grid(used: Tensor, dtype: torch.dtype) -> Grid | None:
    """Return the type in which all these magnitudes can be written, which chance alone does not do."""
    if len(used) < _MANY or len(used[:_LOOKED_AT].unique()) < 8:
        return None
    held = [name for name, kind in _GRIDS if bool((used.to(kind).double() == used).all())]
    widest = torch.finfo(dtype).bits if dtype.is_floating_point else 64
    return next((name for name in held if torch.finfo(getattr(torch, name)).bits < widest), None)


def innermost(observation: Observation) -> tuple[Any, int]:
    """Return the step that takes gradients, inside defences and sums, and how many images it is given."""
    client, count = undefended(observation.protocol), observation.num_images
    while hasattr(client, "client") and hasattr(client, "images"):
        client, count = client.client, client.images(count)
    return client, count


def steps_of(observation: Observation) -> int:
    """Return how many local steps the client's protocol has; one where it does not say."""
    client, count = innermost(observation)
    batches = getattr(client, "batches", None)
    return len(batches(count)) if batches else 1


def precision(observation: Observation, numbers: Numbers) -> float:
    """Return the relative rounding error of the update's numbers: of their type, or of a coarser grid."""
    dtype = next(iter(observation.update.values())).dtype
    own = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return max(own, torch.finfo(getattr(torch, numbers.grid)).eps if numbers.grid else 0.0)


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """What is in a layer's update and cannot be of a client's gradient: noise, or all of it.

    Args:
        layer: the parameter's name.
        how: which identity it disobeys, in a clause.
        sigma: the standard deviation of independent noise in each number that leaves as much.
        error: the relative standard error of that.
        share: of the layer's squared length: 0 of a gradient to rounding, and 1 of independent numbers.
        rounding: the standard deviation that the update's precision leaves by itself.
        clear: by how many standard errors the rest stands out from independent numbers.
    """

    layer: str
    how: str
    sigma: float
    error: float
    share: float
    rounding: float
    clear: float

    @property
    def there(self) -> bool:
        """Whether it is more than rounding."""
        return self.sigma > 10 * self.rounding

    @property
    def all_of_it(self) -> bool:
        """Whether nothing is left that could not be independent numbers."""
        return self.there and self.share > 0.5 and self.clear < _CLEAR


def distorted(observation: Observation) -> bool:
    """Say whether a client states that its update is no gradient up to a factor: noise, rounding, a part."""
    transforms = getattr(observation.protocol, "transforms", ())
    return bool(observation.sent) or any(not isinstance(transform, Clip) for transform in transforms)


def foreign(model: nn.Module, observation: Observation, eps: float) -> list[Foreign]:
    r"""Measure what no client's gradient has, in two ways.

    The gradients of cross-entropy with respect to the logits add up to zero over the classes, and so do the
    rows of the last layer's gradient, whatever the images and however many: what their sum is, is noise. The
    gradient of a fully connected layer is a sum of N outer products, and what its singular values leave
    behind the N-th is noise, too.

    Args:
        model: the model that the client received.
        observation: what the server saw.
        eps: the relative rounding error of its numbers.
    """
    found = []
    with suppress(InvlibError):
        found.append(_of_sums(model, observation, eps))
    for name, gradient, most in fully_connected_gradients(model, observation):
        rows, columns = gradient.shape[0] - most, gradient.shape[1] - most
        if min(rows, columns) < 8 or not gradient.any():
            continue
        largest, left = _without_products(gradient, most)
        variance = left / (rows * columns)
        # where noise covers the products, its own largest directions were left out in their place
        shrunk = most * (2 * math.sqrt(gradient.numel()) + most) / (2 * rows * columns)
        found.append(
            Foreign(
                layer=name,
                how=f"its rank is {most} at most",
                sigma=math.sqrt(variance),
                error=1 / math.sqrt(2 * rows * columns) + 1 / min(rows, columns) + shrunk,
                share=min(1.0, variance * gradient.numel() / float(gradient.square().sum())),
                rounding=_rounding(model, observation, name, eps),
                clear=_above_edge(largest / max(variance, 1e-300), gradient.shape),
            )
        )
        break
    return found


def _without_products(gradient: Tensor, count: int) -> tuple[float, float]:
    """Return the largest squared singular value, and the sum of all others behind so many.

    What is left is subtracted as a matrix: of squares, rounding would be all of the difference.
    """
    width = min(*gradient.shape, 2 * count + 16)
    generator = torch.Generator().manual_seed(0)
    view = torch.randn(gradient.shape[1], width, dtype=gradient.dtype, generator=generator)
    basis = torch.linalg.qr(gradient @ view)[0]
    for _ in range(2):
        basis = torch.linalg.qr(gradient @ (gradient.T @ basis))[0]
    columns, values, _ = torch.linalg.svd(basis.T @ gradient, full_matrices=False)
    columns = basis @ columns[:, :count]
    return float(values[0]) ** 2, float((gradient - columns @ (columns.T @ gradient)).square().sum())


def noise_of(found: list[Foreign]) -> Foreign | None:
    """Return the most exact of several measurements of noise; None unless all of them see some."""
    return min(found, key=lambda f: f.error) if found and all(f.there for f in found) else None


def _above_edge(square: float, shape: Sequence[int]) -> float:
    """Return by how much the largest squared singular value is above that of independent numbers.

    Of variance 1, in the unit of its fluctuation (Johnstone 2001).
    """
    one, other = (math.sqrt(n) for n in shape)
    width = (one + other) * math.cbrt(1 / one + 1 / other)
    return (square - (one + other) ** 2) / width


def _of_sums(model: nn.Module, observation: Observation, eps: float) -> Foreign:
    head = Head.of(model, observation)
    loss = observation.loss or F.cross_entropy
    if not getattr(observation.protocol, "linear", True):
        raise RecoveryError("the client's update is no sum of gradients")
    if not balanced(loss, like(model).new_zeros(1, num_classes(model, observation.image_shape))):
        raise RecoveryError("the loss does not make the gradients of the logits add up to zero")
    names = [name for name in head.names if name in observation.update and name not in observation.sent]
    parts = [_rows(observation.without_decay(name, model), head, name) for name in names if name]
    if not parts:
        raise RecoveryError("the last layer was not sent whole")
    whole = torch.cat(parts, 1)
    sums, size = whole.sum(0), float(whole.square().sum())
    if not size:
        raise RecoveryError("the last layer's update is all zero")
    sigma, share = float(sums.norm()) / math.sqrt(whole.numel()), float(sums.square().sum()) / size
    slopes = head_slopes(model, observation)
    # Probabilities are rounded to a last place of 1, however small the slopes of a sure network are.
    sure = 1.0 if slopes is None else max(1.0, 1 / max(float(slopes.norm()), 1e-30))
    return Foreign(
        layer=str(head.names[1]),
        how="its rows add up to zero over the classes",
        sigma=sigma,
        error=1 / math.sqrt(2 * whole.shape[1]),
        share=min(1.0, share),
        rounding=sure * max(_rounding(model, observation, str(name), eps) for name in names),
        clear=(1 - share) * math.sqrt(whole.shape[1] / 2),
    )


def _rows(value: Tensor, head: Head, name: str) -> Tensor:
    """Return a last layer's bias as ``(classes, 1)``, or its weight as ``(classes, D)``."""
    return value.double().cpu().flatten()[:, None] if name == head.names[0] else head.rows(value)


def _rounding(model: nn.Module, observation: Observation, name: str, eps: float) -> float:
    """Return the standard deviation of rounding: of a gradient, or of weights before and after."""
    value = observation.update[name].double()
    size = float(value.square().mean().sqrt())
    if not isinstance(innermost(observation)[0], FedSGD):
        weight = trainable_parameters(model)[name].detach()
        size = max(size, float(weight.double().square().mean().sqrt()) * torch.finfo(weight.dtype).eps / eps)
    return eps * size


def fully_connected_gradients(
    model: nn.Module, observation: Observation
) -> Iterator[tuple[str, Tensor, int]]:
    """Yield each weight that sees an image once, its update ``(m, d)`` without decay, and the highest rank.

    Over several local steps the inputs of all layers move but for the first, which sees the images.
    """
    if observation.is_text or not getattr(observation.protocol, "linear", True):
        return
    steps = steps_of(observation)
    _, calls = record_layers(model, blank(observation.image_shape), nn.Linear)
    for call in calls:
        name = f"{call.name}.weight"
        if name not in observation.update or name in observation.sent or call.given.ndim != 2:
            continue
        sees_images = call.given.numel() == math.prod(observation.image_shape) and call is calls[0]
        most = observation.num_images * (1 if sees_images else steps)
        yield name, observation.without_decay(name, model).detach().double().cpu(), most


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The rank of a fully connected layer's update.

    Args:
        layer: the weight's name.
        rank: how many outer products it is the sum of, to rounding.
        most: how many the client's images make.
        limit: the highest rank that would show: one less than rows, active ones, and columns.
        gap: by which factor the singular values fall behind it.
    """

    layer: str
    rank: int
    most: int
    limit: int
    gap: float


def ranks(model: nn.Module, observation: Observation) -> list[Rank]:
    """Return the ranks of fully connected layers whose singular values fall to rounding somewhere."""
    found = []
    for name, gradient, most in fully_connected_gradients(model, observation):
        try:
            span = span_of(gradient, expected=observation.num_images)
        except RecoveryError:
            continue
        limit = min(int(gradient.any(1).sum()), int(gradient.any(0).sum())) - 1
        if span.gap >= _FALL:
            found.append(Rank(layer=name, rank=span.rank, most=most, limit=limit, gap=span.gap))
    return found


@dataclass(frozen=True, kw_only=True)
class ScaleFree:
    r"""Whether layers before batch norm were trained with the statistics of the batch.

    Those make the loss independent of the length of the weights before them, so that a gradient is
    perpendicular to its weights; with running statistics it is not.

    Args:
        layers: how many layers are followed by batch norm at once.
        alignment: :math:`\sqrt{k} \cos(W_c, \partial L / \partial W_c)`, the root of its mean square over the
            output channels, with :math:`k` weights each: about 1 in evaluation mode, 0 in training mode.
    """

    layers: int
    alignment: float

    @property
    def training(self) -> bool | None:
        """Whether the client ran them in training mode; None where the alignment does not tell."""
        return True if self.alignment < 0.1 else False if self.alignment > 0.3 else None


def scale_free(model: nn.Module, observation: Observation) -> ScaleFree | None:
    """Measure the alignment of weights before batch norm with their update; None where there are none.

    Source: the scale invariance is that of Ioffe and Szegedy 2015, arXiv 1502.03167; its use to tell the
    client's mode is this project's.
    """
    if not getattr(observation.protocol, "linear", True):
        return None
    before, norm = (nn.modules.conv._ConvNd, nn.Linear), nn.modules.batchnorm._BatchNorm
    _, calls = record_layers(model, blank(observation.image_shape), (*before, norm))
    pairs, squares = 0, []
    for first, then in itertools.pairwise(calls):
        if (
            not isinstance(then.layer, norm)
            or isinstance(first.layer, norm)
            or then.given is not first.output
        ):
            continue
        name = f"{first.name}.weight"
        if (
            name not in observation.update
            or name in observation.sent
            or getattr(first.layer, "transposed", False)
        ):
            continue
        weight = trainable_parameters(model)[name].detach().double().cpu().flatten(1)
        update = observation.without_decay(name, model).detach().double().cpu().flatten(1)
        seen = (update.norm(dim=1) > 0) & (weight.norm(dim=1) > 0)
        if weight.shape[1] < 4 or not seen.any():
            continue
        pairs += 1
        squares.append(weight.shape[1] * F.cosine_similarity(weight[seen], update[seen], dim=1).square())
    return ScaleFree(layers=pairs, alignment=float(torch.cat(squares).mean().sqrt())) if pairs else None


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Whether the last layer's update of one image is what the model's own last layer makes of its features.

    Args:
        layer: the weight's name.
        rank_one: the share of the update that is no product of signals and features.
        gap: how far the model's prediction for these features is from the signals, as a share of them.
        label: the smallest entry of the label that would explain them; below zero there is none.
        negative: how many signals are below zero: of a hard label one, its own.
        positive: how many are above.
        length: the sum of the signals above zero; at most 1 of a mean over images.
    """

    layer: str
    rank_one: float
    gap: float
    label: float
    negative: int
    positive: int
    length: float


def softmax(model: nn.Module, observation: Observation) -> Softmax | None:
    r"""Hold the last layer's update of one image and one step against the softmax's own equation.

    The update is :math:`\delta a^\top` with :math:`\delta = \mathrm{softmax}(W a + b) - e_y`, so that
    :math:`a` and :math:`\delta` are read off, and the model has to make one of the other. A factor of the
    update, of clipping say, is allowed for.

    Returns:
        None where there are several images or steps, no bias, or another loss.
    """
    plain = observation.loss in (None, F.cross_entropy)
    if observation.num_images != 1 or steps_of(observation) != 1 or not plain:
        return None
    try:
        head = Head.of(model, observation)
        rows = head.weight_of(observation, model)
        if not head.bias or rows is None:
            return None
        signals = head.mean(observation, model)
    except RecoveryError:
        return None
    own = dict(model.named_parameters())
    weight, bias = head.rows(own[head.names[1]]), own[head.name].detach().double().cpu().flatten()
    if not signals.any() or len(signals) < 3:
        return None
    features = signals @ rows / signals.square().sum()
    predicted = (weight @ features + bias).softmax(0)
    wanted = predicted - F.one_hot(signals.argmin(), len(signals))
    factor = (wanted @ signals) / wanted.square().sum().clamp_min(1e-300)
    return Softmax(
        layer=head.names[1],
        rank_one=float((rows - torch.outer(signals, features)).norm() / rows.norm().clamp_min(1e-300)),
        gap=float((signals - factor * wanted).norm() / signals.norm()),
        label=float((predicted - signals).min()),
        negative=int((signals < 0).sum()),
        positive=int((signals > 0).sum()),
        length=float(signals.clamp_min(0).sum()),
    )
