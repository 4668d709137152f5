"""Label inference: which classes a client trained on, read off the update before any image is sought."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.losses import balanced, batch_scale, binary_labels, class_slopes, kind_of
from invlib.core.calls import logits_layer, logits_layer_inputs
from invlib.core.network import (
    blank,
    forward,
    in_mode,
    like,
    num_classes,
    placed,
    trainable_parameters,
    unwrapped,
)
from invlib.core.network import classifier as classifier
from invlib.core.observation import ClientStep, Loss, Observation, words_of
from invlib.errors import RecoveryError
from invlib.federated import FedAvg, FedSGD

_FOREIGN = 0.45  # share of a gradient that labels leave unexplained, from which on they are none: noise of a
# third of its length leaves up to 0.3, soft labels 0.46, the loss of several labels at once 0.75 and more
_ROUNDING = 0.1  # the same of its sum over the classes, with room for noise
_UNEXPLAINED = 0.3  # the same, from which on other factors than 1 are tried
_LAST = 2.0**-22  # by which single precision may round a probability near 1, with room
_TRIED = 8  # labels or exchanges that are tried by simulating a client


@dataclass(frozen=True, kw_only=True)
class LabelInference:
    r"""Labels read off an update.

    Args:
        labels: int64 ``(N,)``, ascending: their order within the batch leaves no trace in a mean gradient.
            Zeros and ones ``(1, classes)`` of floating point where each image has several labels.
        counts: int64 ``(classes,)``, how many images of each class.
        method: which rule gave them, in words.
        doubt: 0 where they are exact, up to 1. Of a batch it is :math:`r / r'`, where :math:`r` is how far
            the gradient of the logits is from what the counts :math:`n` make of typical predictions,
            :math:`\| f g - \sum_c n_c\, \bar g_c \|` with a factor :math:`f`, and :math:`r'` the same for the
            best other counts. Of one image it is the share of the gradient that no one label can make.
        guess: whether they are an estimate.
        factor: :math:`f`; not 1 where the update is longer or shorter than the loss makes it, as a clipped
            one is.
    """

    labels: Tensor
    counts: Tensor
    method: str
    doubt: float = 0.0
    guess: bool = False
    factor: float = 1.0

    def __str__(self) -> str:
        factor = "" if self.factor == 1 else f" times {self.factor:.3g}, which the loss does not explain"
        how = "guessed" if self.guess else "inferred"
        return f"labels were {how}: {self.method}{factor}; doubt {self.doubt:.2f}"


def infer(
    model: nn.Module, observation: Observation, *, loss: Loss | None = None, samples: int = 64
) -> LabelInference:
    r"""Infer the labels of the client's images from the gradient of the layer that makes the logits.

    With cross-entropy the bias gradient of class :math:`c` is the mean of :math:`p_c - [y = c]`, so it
    is negative only for classes in the batch. For one image its smallest entry is the label. For a batch
    of :math:`N` images the counts are about :math:`N(\bar p_c - g_c)`; the mean prediction
    :math:`\bar p` is estimated by running the model on random images. Other losses of classes are asked for
    their gradients at the same predictions, :math:`\bar g_c` for label :math:`c`, and the counts are those
    for which :math:`\sum_c n_c\, \bar g_c` is nearest to the gradient. A weight update is turned into a mean
    gradient first, which also mends its opposite sign; a client's step that cannot say how is run on random
    images.

    Without a bias the weight gradient has to say it. For one image, row :math:`c` is
    :math:`(p_c - [y = c])\, a` with the features :math:`a` of unknown sign. As the factors add up to zero,
    the row of the label has the opposite direction of all others and the length of their sum, whatever
    :math:`a` is. Where only two rows differ from zero, as with two classes, they are each other's negative
    and either may be the label's: the one opposed to the mean features of random images is taken, which is
    right for features that cannot be negative (or positive), and a guess for others. For a batch, row sums
    take the place of the bias gradient, divided by the mean sum of such features.

    Where each logit has a label of its own (binary cross-entropy), the signs of one image's bias gradient
    are its labels.

    Args:
        model: the model that the client received.
        observation: what the server saw.
        loss: the client's loss; None takes the observation's, or else cross-entropy.
        samples: how many random images estimate the mean prediction of a batch.

    Returns:
        The labels (exact for one image, but for the two rows above; an estimate for batches).

    Raises:
        RecoveryError: no layer is known to make the logits, the update lacks it, its gradient is zero or one
            that no labels make, or the loss takes no classes.

    Source: Zhao et al. 2020 (iDLG), arXiv 2001.02610, for one image; Wainakh et al. 2022 (LLG),
    arXiv 2105.09369, for batches.

    Taught in: chapter 1
    """
    model = unwrapped(model)
    chosen = loss or observation.loss or F.cross_entropy
    try:
        return _inferred(model, observation, chosen, samples)
    except RecoveryError as error:
        raise RecoveryError(
            f"labels not inferred, because {error}; give them (labels=...), or the client's loss (loss=...) "
            f"if it is not {words_of(chosen)}"
        ) from error


def _inferred(model: nn.Module, observation: Observation, loss: Loss, samples: int) -> LabelInference:
    count, some = observation.num_images, like(model)
    classes = num_classes(model, observation.image_shape)
    kind = kind_of(loss, count, classes, some)
    if kind == "none":
        return _labels(
            torch.zeros(count, dtype=torch.int64), classes, "the loss takes no notice of them", 1.0
        )
    if kind is None:
        what = "takes no classes" if classes > 1 else "makes no classes of one logit"
        raise RecoveryError(f"the loss {words_of(loss)} {what}")
    if kind == "signs" and count > 1:
        raise RecoveryError(f"one gradient of {count} images does not tell which has which of several labels")
    if observation.is_text and (count > 1 or not hasattr(observation.protocol, "mean_gradient")):
        raise RecoveryError(f"there are {count} sequences of {words_of(observation.protocol)}; expected one")
    head = _Head.of(model, observation)
    client = (
        None if hasattr(observation.protocol, "mean_gradient") else _Simulated(model, observation, loss, head)
    )
    gradient = (
        head.read(observation.update[head.name]) / client.factor if client else head.mean(observation, model)
    )
    if not torch.isfinite(gradient).all():
        raise RecoveryError(f"the gradient of {head.name!r} has NaN or infinite numbers")
    if not gradient.any():
        raise RecoveryError(f"the gradient of {head.name!r} is all zero; it says nothing about the labels")
    typical = _Typical(model, observation, head, samples, trains=client is not None and client.factor < 0)
    if kind == "signs":
        found = _signs(loss, gradient, typical, some)
    elif client is not None and count == 1:
        found = client.tried(gradient)
    elif count == 1:
        whole = head.name not in observation.sent and balanced(loss, some.new_zeros(1, classes))
        found = _one(gradient, typical, whole)
    else:
        found = _batch(loss, gradient, typical, observation, parallel=client is None or client.linear)
        found = found if client is None or client.linear else client.exchanged(found)
    device = observation.update[head.name].device
    return replace(found, labels=found.labels.to(device), counts=found.counts.to(device))


def _labels(
    labels: Tensor, classes: int, method: str, doubt: float, factor: float = 1.0, *, least: float = 0.0
) -> LabelInference:
    counts = torch.bincount(labels, minlength=classes)
    doubt = min(max(doubt, 0.0), 1.0)
    return LabelInference(
        labels=labels, counts=counts, method=method, doubt=doubt, guess=doubt > least, factor=factor
    )


@dataclass(frozen=True, kw_only=True)
class _Head:
    """The parameter that labels are read off: the bias of the layer that makes the logits, or its weight."""

    name: str
    bias: bool
    transposed: bool

    @staticmethod
    def of(model: nn.Module, observation: Observation) -> _Head:
        layer = logits_layer(model, observation.image_shape)
        names = [n for n in (layer.bias, layer.weight) if n in observation.update]
        if not names:
            raise RecoveryError(f"the update lacks {layer.weight!r}, the layer that makes the logits")
        name = next((n for n in names if n not in observation.sent), names[0])
        assert name is not None
        return _Head(name=name, bias=name == layer.bias, transposed=layer.transposed)

    def read(self, value: Tensor) -> Tensor:
        """Return the bias ``(classes,)`` or the weight ``(classes, D)``, float64 on the CPU."""
        value = value.detach().double().cpu()
        if self.bias:
            return value.flatten()
        return value.mT if self.transposed else value.flatten(1)

    def mean(self, observation: Observation, model: nn.Module) -> Tensor:
        if self.bias and observation.num_images == 1 and self.name in observation.sent:
            # Of one image the label's entry alone is negative, so that a part of the bias may do.
            return self.read(observation.protocol.mean_gradient(observation.update[self.name], 1))
        return self.read(observation.mean_gradient(self.name, model))

    def nudged(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return parameters with 1 added to all that makes the first logit."""
        value = params[self.name].clone()
        rows = value.view(-1)[:1] if self.bias else (value[:, :1] if self.transposed else value[:1])
        rows += 1
        return {**params, self.name: value}


class _Typical:
    """What the network makes of random images: its predictions, and the inputs of its last layer.

    The images are noise at several scales, since predictions depend on how smooth an image is. A client
    that trains for some steps predicts with weights that move, from the ones sent to it to the ones it
    sends back; the server knows both ends and takes the mean. Nothing is run until it is asked for.
    """

    def __init__(
        self, model: nn.Module, observation: Observation, head: _Head, samples: int, *, trains: bool
    ) -> None:
        self.model, self.observation, self.head = model, observation, head
        images = placed(_noise_images(samples, observation.image_shape), model)
        self.inputs = images if observation.is_text else observation.normalization.encode(images)
        params = trainable_parameters(model)
        self.ends = [params]
        if trains or isinstance(observation.protocol, FedAvg):
            self.ends.append({name: p + observation.update[name].to(p) for name, p in params.items()})

    def run(self, params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        with torch.no_grad(), in_mode(self.model, training=self.observation.training_mode, seed=0):
            return forward(self.model, params, None, inputs)

    def logits(self) -> Tensor:
        return torch.cat([self.run(end, self.inputs) for end in self.ends])

    def scale(self) -> float:
        """Return by how much the mean gradient that is read is larger than that of a logit."""
        # Every image has the same one for a bias; two are few, and enough for batch norm.
        inputs = self.inputs[:2] if self.head.bias else self.inputs
        steps = [self.run(self.head.nudged(end), inputs) - self.run(end, inputs) for end in self.ends]
        first = torch.cat(steps).double()
        # The difference of two logits stays where log_softmax shifts them all.
        return float((first[:, 0] - (first[:, 1] if first.shape[1] > 1 else 0)).mean())

    def features(self) -> Tensor:
        training = self.observation.training_mode
        parts = [
            logits_layer_inputs(self.model, self.inputs, params=end, training=training)[1]
            for end in self.ends
        ]
        return torch.cat(parts).double().cpu().mean(0)


def _noise_images(samples: int, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return blank(shape, samples)
    channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    parts = []
    for coarse in (1, 4, 8):
        count = -(-samples // 3)
        size = (max(1, min(coarse, height)), max(1, min(coarse, width)))
        noise = torch.rand(count, channels, *size, generator=generator)
        parts.append(F.interpolate(noise, (height, width), mode="bilinear"))
    return torch.cat(parts)


def _one(gradient: Tensor, typical: _Typical, whole: bool) -> LabelInference:
    """Return the label of one image, which alone has a negative factor; ``whole``: they add up to zero."""
    if gradient.ndim == 1:
        low = gradient.sort().values
        # Of a network that is sure of its label, p - 1 may be rounded to zero, where nothing else is.
        sure = whole and low[0] == 0 < low[1] and gradient.sum() <= _LAST
        if low[0] >= 0 and not sure:
            raise RecoveryError("no entry of the bias gradient is negative, as the label's is")
        label, method = int(gradient.argmin()), "smallest entry of the bias gradient"
        doubt = 0.0 if sure else max(0.0, float(low[1] / low[0]))
        whole = whole and float(gradient.sum().abs()) > _LAST
    else:
        label, method, doubt = _opposed_row(typical, gradient)
    rest = float(gradient.sum(0).norm() / gradient.reshape(len(gradient), -1).norm(dim=1).sum())
    doubt = max(doubt, rest) if whole else doubt
    if doubt > _FOREIGN and "random images" not in method:
        raise RecoveryError(
            f"one label leaves {doubt:.0%} of the gradient of {typical.head.name!r} unexplained"
        )
    return _labels(torch.tensor([label]), len(gradient), method, doubt, least=0.01)


def _opposed_row(typical: _Typical, gradient: Tensor) -> tuple[int, str, float]:
    """Return which row of one image's weight gradient is opposed to the others, by what, and the doubt."""
    rows = gradient / gradient.abs().max()
    along = rows @ rows[rows.square().sum(1).argmax()]
    first, second = int(along.argmax()), int(along.argmin())
    # The factors of all rows add up to zero. Where these two differ by little more than rounding, the sum of
    # the others, which is the same difference, says it without cancellation.
    longer = along[first] + along[second]
    if longer.abs() <= 1e-3 * along[first]:
        others = torch.ones_like(along)
        others[[first, second]] = 0
        longer = -(along * others).sum()
    if longer != 0:
        label = first if longer > 0 else second
        same = along * along[label].sign()
        others = same.masked_fill(torch.arange(len(same)) == label, 0)
        method = "row of the weight gradient that is opposed to all others"
        return label, method, float(others.max() / same[label])
    features = typical.features()
    cosine = float(F.cosine_similarity(rows[first], features, dim=0))
    method = "row of the weight gradient that is opposed to the features of random images"
    return second if cosine > 0 else first, method, 1 - abs(cosine)


def _signs(loss: Loss, gradient: Tensor, typical: _Typical, some: Tensor) -> LabelInference:
    per_class, doubt = gradient, 0.0
    if gradient.ndim == 2:
        features = typical.features()
        per_class = gradient @ features
        doubt = 1 - float(per_class.norm() / (gradient.norm() * features.norm()))
    ones = (per_class < 0)[None]
    what = "bias gradient" if gradient.ndim == 1 else "weight gradient along the features of random images"
    return LabelInference(
        labels=binary_labels(loss, ones.to(some.device), some),
        counts=ones.sum(0),
        method=f"signs of the {what}",
        doubt=doubt,
        guess=doubt > 0,
    )


def _batch(
    loss: Loss, gradient: Tensor, typical: _Typical, observation: Observation, *, parallel: bool
) -> LabelInference:
    """Return the counts whose gradients at typical predictions add up to the one that was observed.

    Args:
        loss: the client's.
        gradient: of the bias or the weight.
        typical: what the network makes of random images.
        observation: what the server saw.
        parallel: it is a gradient up to a factor, and not what an optimiser such as Adam makes of it.
    """
    count, classes = observation.num_images, len(gradient)
    source = "bias gradient" if gradient.ndim == 1 else "row sums of the weight gradient"
    per_class = (gradient if gradient.ndim == 1 else gradient.sum(1)) / typical.scale()
    logits = typical.logits()
    if loss is F.cross_entropy:
        rest = float(per_class.sum().abs() / per_class.abs().sum())
        predictions = logits.softmax(-1).mean(0).double().cpu()
        fit = _fit(count * predictions, -count * per_class, per_class < 0, count)
    else:
        fit, rest = _fit_of(loss, per_class, logits, observation)
    scaled = fit.factor != 1 or gradient.ndim == 2
    if parallel and (why := _impossible(loss, per_class, rest, count, scaled=scaled)):
        raise RecoveryError(f"no {count} labels make the gradient of {typical.head.name!r}: {why}")
    labels = torch.repeat_interleave(torch.arange(classes), fit.counts)
    return _labels(labels, classes, f"counts from the {source}", max(fit.doubt, rest, 1e-6), fit.factor)


def _impossible(loss: Loss, per_class: Tensor, rest: float, count: int, *, scaled: bool) -> str:
    """Return what about the gradient of the logits no labels can make; ``scaled``: by an unknown factor."""
    if rest > _ROUNDING:
        return f"{rest:.0%} of it are left when it is added up over the classes, and 0 by {words_of(loss)}"
    if loss is not F.cross_entropy:
        return ""
    if (low := int((per_class < -_ROUNDING * per_class.abs().max()).sum())) > count:
        return f"{low} of its entries are negative, as those of classes in the batch are"
    if not scaled and (total := float(per_class.clamp_min(0).sum())) > 1.1:
        return f"its positive entries add up to {total:.3g}, as no predictions do"
    return ""


def _fit_of(loss: Loss, per_class: Tensor, logits: Tensor, observation: Observation) -> tuple[_Fit, float]:
    """Return the counts by a loss of which only its gradients are known, and what they cannot explain."""
    count, classes = observation.num_images, len(per_class)
    normalised = bool(logits.logsumexp(1).abs().max() < 1e-3)  # the model ends with log_softmax
    inner: Loss = (lambda z, t: loss(F.log_softmax(z, -1), t)) if normalised else loss
    rows, flat = class_slopes(inner, logits), class_slopes(inner, logits.new_zeros(1, classes))
    # With predictions as far from even as can be, what other labels leave of an entry is least.
    sure = class_slopes(inner, 40 * F.one_hot(torch.tensor([0, 1]), classes).to(logits))
    others = float((sure + torch.diag(torch.full((classes,), torch.inf))).min())
    protocol = observation.protocol
    whole: list[slice | list[int]] = [slice(None)]
    batches = protocol.batches(count) if isinstance(protocol, FedAvg) else whole
    # Columns of the system add up to what no counts change, where gradients add up to zero over classes.
    mean = float(rows.abs().mean())
    sides = torch.stack([torch.full_like(per_class, mean * count), per_class], 1)
    constant, along = torch.linalg.lstsq(rows.T + mean, sides, driver="gelsd").solution.unbind(1)

    def scale_of(counts: Tensor) -> float:
        labels = torch.repeat_interleave(torch.arange(classes), counts)
        mixed = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        return batch_scale(inner, labels[mixed], batches, logits, flat)

    # The scale depends on the counts, where classes have weights: both are found in turn, from two starts.
    even = torch.bincount(torch.arange(count) % classes, minlength=classes)
    plain = _fit(torch.full_like(per_class, count / classes), -count * per_class, per_class < 0, count).counts
    found = dict[tuple[int, ...], tuple[float, _Fit]]()
    for counts in (even, plain):
        for _ in range(6):
            scale = scale_of(counts)
            fit = _fit(constant, along / scale, per_class < scale * count * min(0.0, others), count, rows)
            counts, key = fit.counts, tuple(fit.counts.tolist())
            if key in found:
                break
            made = scale_of(counts) * counts.double() @ rows
            found[key] = float((made / fit.factor - per_class).norm()), fit
    fit = min(found.values(), key=lambda one: one[0])[1]
    rest = float(per_class.sum().abs() / per_class.abs().sum())
    return fit, rest if balanced(inner, logits.new_zeros(1, classes)) else 0.0


@dataclass(frozen=True, kw_only=True)
class _Fit:
    counts: Tensor
    factor: float
    residual: float
    doubt: float


def _fit(constant: Tensor, slope: Tensor, present: Tensor, total: int, rows: Tensor | None = None) -> _Fit:
    """Return whole counts ``n`` near ``constant + factor * slope``, and the factor, 1 where that explains it.

    Distances are those of ``n @ rows``; None takes the counts themselves.
    """

    def seen(counts: Tensor) -> Tensor:
        return counts if rows is None else counts @ rows

    def rounded(factors: Tensor) -> Tensor:
        return _whole_counts(constant + factors[:, None] * slope, present=present, total=total)

    along = seen(slope)
    factor, others = torch.ones(1, dtype=slope.dtype), 0.0
    counts = rounded(factor)
    share = (seen(counts - constant) - along).norm() / along.norm()
    if share > _UNEXPLAINED:
        factors = 2.0 ** torch.linspace(-16, 16, 129, dtype=slope.dtype)
        for _ in range(3):
            tried = rounded(factors)
            made = seen(tried - constant)
            fitted = made.square().sum(1) / (made @ along)
            factors = torch.where((fitted > 0) & fitted.isfinite(), fitted, factors)
        shares = (made / factors[:, None] - along).norm(dim=1) / along.norm()
        least, best = float(shares.min()), shares.argmin()
        rivals = shares[(tried != tried[best]).any(1)]
        rival = least / max(float(rivals.min()), 1e-300) if len(rivals) else 0.0
        # Predictions that are not typical are a little like a factor; they leave less of it.
        none = float(share) > 1.5 or float((constant + slope).max()) > 1.5 * total + 0.5
        if (none and least < 0.7) or (least < min(0.1, float(share) / 5) and rival < 0.4):
            factor, counts, others = factors[best][None], tried[best][None], rival
    chosen = counts[0]
    low = present.long() if int(present.sum()) <= total else torch.zeros_like(chosen)
    gap = chosen - constant - factor * slope
    products = None if rows is None else rows @ rows.T
    change, away, to = _best_exchange(chosen, gap, low, products)
    for _ in range(4 * len(chosen) if rows is not None else 0):
        if change >= 0:
            break
        for row, by in ((away, -1), (to, 1)):
            chosen[row] += by
            gap[row] += by
        change, away, to = _best_exchange(chosen, gap, low, products)
    square = float(seen(gap).square().sum())
    rival = square + max(change, 0.0)
    doubt = (square / rival) ** 0.5 if rival > 0 else 0.0
    return _Fit(counts=chosen, factor=float(factor), residual=square**0.5, doubt=max(doubt, others))


def _best_exchange(
    counts: Tensor, gap: Tensor, low: Tensor, products: Tensor | None
) -> tuple[float, int, int]:
    """Return how the squared distance changes, at best, by one image of another class, and which classes."""
    can_give = counts > low
    if products is None:
        away = int(gap.masked_fill(~can_give, -torch.inf).argmax())
        rest = gap.clone()
        rest[away] = torch.inf
        to = int(rest.argmin())
        return (float(2 * (gap[to] - gap[away]) + 2) if can_give.any() else torch.inf), away, to
    along, own = products @ gap, products.diagonal()
    change = 2 * (along[None] - along[:, None]) + own[None] + own[:, None] - 2 * products
    change[~can_give] = torch.inf
    change.fill_diagonal_(torch.inf)
    best = int(change.argmin())
    away, to = divmod(best, len(counts))
    return float(change[away, to]), away, to


def _whole_counts(expected: Tensor, *, present: Tensor, total: int) -> Tensor:
    """Round expected counts ``(..., classes)`` to the nearest whole numbers with the given total.

    There is at least one where a class is present, unless more classes are present than the total.
    """
    expected = expected.double()
    low = present.long() if int(present.sum()) <= total else torch.zeros_like(present, dtype=torch.int64)

    def at(shift: Tensor) -> Tensor:
        return torch.maximum((expected + shift).floor().long(), low)

    # All are raised by the same amount: the largest that does not exceed the total, and a hair more.
    edge = expected.abs().amax(-1, keepdim=True) + total + 1
    below, above = -edge, edge
    for _ in range(80):
        middle = (below + above) / 2
        fits = at(middle).sum(-1, keepdim=True) <= total
        below, above = torch.where(fits, middle, below), torch.where(fits, above, middle)
    counts = at(below)
    short = total - counts.sum(-1, keepdim=True)
    gap = torch.where(at(above) > counts, expected - counts, -torch.inf)
    place = gap.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return counts + (place < short).long()


class _Simulated:
    """A client's step that cannot turn its update into a gradient, run on random images of chosen labels.

    Attributes:
        factor: from the mean gradient to what the step makes of it; negative where it trains.
        linear: whether the two are as good as parallel.
    """

    def __init__(self, model: nn.Module, observation: Observation, loss: Loss, head: _Head) -> None:
        self.model, self.observation, self.loss, self.head = model, observation, loss, head
        images = _noise_images(3 * observation.num_images, observation.image_shape)
        images = images.view(3, observation.num_images, *images.shape[1:]).mean(0)
        self.inputs = observation.normalization.encode(images.to(like(model)))
        self.sent = head.read(observation.update[head.name])
        classes = len(self.sent)
        labels = torch.arange(observation.num_images) % classes
        made, plain = self.run(labels), self.run(labels, FedSGD())
        along = float((made * plain).sum())
        self.factor = along / max(float(plain.square().sum()), 1e-300)
        share = abs(along) / max(float(made.norm() * plain.norm()), 1e-300)
        self.linear = share > 0.95
        if not share > 0.1:
            raise RecoveryError(
                f"what the client's step {words_of(observation.protocol)} makes of random images has nothing "
                "in common with their gradient, and it has no method mean_gradient"
            )

    def run(self, labels: Tensor, client: ClientStep | None = None) -> Tensor:
        """Return what the client sends of the parameter that labels are read off."""
        client = client or self.observation.protocol
        some = self.inputs
        if kind_of(self.loss, len(some), len(self.sent), some) == "signs":
            labels = binary_labels(self.loss, torch.zeros(len(some), len(self.sent)), some).to(some.device)
        with torch.enable_grad(), in_mode(self.model, training=self.observation.training_mode, seed=0):
            update = client(
                self.model,
                some,
                labels.to(some.device),
                params={n: p.clone().requires_grad_() for n, p in trainable_parameters(self.model).items()},
                buffers={n: b.detach().clone() for n, b in self.model.named_buffers()},
                loss=self.loss,
            )
        return self.head.read(update[self.head.name])

    def distance(self, labels: Tensor) -> float:
        """Return one minus the cosine of what these labels make and what was observed."""
        return 1 - float(F.cosine_similarity(self.run(labels).flatten(), self.sent.flatten(), dim=0))

    def tried(self, gradient: Tensor) -> LabelInference:
        """Return the label of one image whose simulated update has the direction of the observed one."""
        rows = gradient if gradient.ndim == 1 else gradient @ gradient[gradient.norm(dim=1).argmax()]
        either = [rows] if gradient.ndim == 1 else [rows, -rows]
        likely = torch.cat([some.argsort()[:_TRIED] for some in either]).unique().tolist()
        far = sorted((self.distance(torch.tensor([label])), label) for label in likely)
        doubt = 0.0 if len(far) == 1 else far[0][0] / max(far[1][0], 1e-300)
        labels = torch.tensor([far[0][1]])
        return _labels(labels, len(gradient), "nearest of the labels tried in the client's step", doubt)

    def exchanged(self, found: LabelInference) -> LabelInference:
        """Exchange one label after another while the simulated update comes nearer to the observed one."""
        classes, per_class = len(found.counts), self.sent / self.factor
        per_class = per_class if per_class.ndim == 1 else per_class.sum(1)
        best, counts, rival = self.distance(found.labels), found.counts.clone(), torch.inf
        for _ in range(len(found.labels)):
            away = [c for c in per_class.argsort(descending=True).tolist() if counts[c] > 0]
            likely = [(a, b) for b in per_class.argsort().tolist() for a in away if a != b][:_TRIED]
            tried = []
            for a, b in likely:
                other = counts.clone()
                other[a] -= 1
                other[b] += 1
                tried.append((self.distance(torch.repeat_interleave(torch.arange(classes), other)), other))
            nearest, other = min(tried, key=lambda one: one[0])
            if nearest >= best:
                rival = nearest
                break
            best, counts, rival = nearest, other, best
        labels = torch.repeat_interleave(torch.arange(classes), counts)
        doubt = best / rival if rival > 0 else 1.0
        method = "counts that come nearest in the client's step"
        return _labels(labels, classes, method, max(doubt, 1e-6))


def contradiction(model: nn.Module, observation: Observation) -> str | None:
    """Return how the labels that were given contradict the update, in a sentence; None where they do not.

    Only classes in a batch have negative entries in the bias gradient of the logits, and the sum of the
    others is not negative.
    """
    labels, loss = observation.labels, observation.loss or F.cross_entropy
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        return None
    try:
        model = unwrapped(model)
        head = _Head.of(model, observation)
        if (
            not head.bias
            or kind_of(loss, len(labels), len(observation.update[head.name]), like(model)) != "classes"
        ):
            return None
        gradient = head.read(observation.mean_gradient(head.name, model))
    except RecoveryError:
        return None
    absent = torch.ones_like(gradient, dtype=torch.bool)
    absent[labels.cpu()] = False
    others, largest = gradient[absent], gradient.abs().max()
    if (others >= -_FOREIGN * largest).all() and others.sum() >= -_ROUNDING * gradient.abs().sum():
        return None
    turned = not (others > 0.02 * largest).any()
    return "the labels that were given contradict the update, which raises the logits of other classes" + (
        ", as if its sign were turned round (before - after)" if turned else ""
    )
