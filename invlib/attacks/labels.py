"""Label inference: which classes a client trained on, read off the update before any image is sought."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.counts import (
    FRESH,
    TRAINED,
    Counts,
    countable,
    fit_of,
    impossible,
    likeliest,
    likelihoods,
    nearest,
    weighed,
)
from invlib.attacks.demixing import Demixed
from invlib.attacks.lastlayer import MOST, Head, Simulated, Typical, demixed
from invlib.attacks.losses import LAST_PLACE, balanced, binary_labels, kind_of, smoothing_of
from invlib.core.network import classifier as classifier
from invlib.core.network import like, num_classes, unwrapped
from invlib.core.observation import Loss, Observation, words_of
from invlib.errors import RecoveryError
from invlib.federated import FedSGD

_FOREIGN = 0.45  # share of a gradient that labels leave unexplained, from which on they are none: noise of a
# third of its length leaves up to 0.3, soft labels 0.46, the loss of several labels at once 0.75 and more
_ROUNDING = 0.1  # the same of its sum over the classes, with room for noise
_NEGATIVE = 1e-5  # of the largest entry: so far below zero an entry is no rounding
_TRAINED = 0.15  # of what a network tells of other images: fresh ones have up to 0.06, trained ones over 0.28
_SURE = 0.99  # probability from which on the last layer is not asked


@dataclass(frozen=True, kw_only=True)
class LabelInference:
    r"""Labels read off an update.

    Args:
        labels: int64 ``(N,)``, ascending: their order within the batch leaves no trace in a mean gradient.
            Zeros and ones ``(1, classes)`` of floating point where each image has several labels.
        counts: int64 ``(classes,)``, how many images of each class.
        method: which rule gave them, in words.
        doubt: 0 where they are exact, up to 1. Of one image it is the share of the gradient that no one label
            can make. Of a batch with cross-entropy it is the probability that the least certain label is
            wrong. With other losses it is :math:`r / r'`, where :math:`r` is how far
            the gradient of the logits is from what the counts :math:`n` make of typical predictions,
            :math:`\| f g - \sum_c n_c\, \bar g_c \|` with a factor :math:`f`, and :math:`r'` the same for the
            best other counts.
        guess: whether they are an estimate.
        factor: :math:`f`; not 1 where the update is longer or shorter than the loss makes it, as a clipped
            one is.
        confidence: float64 ``(N,)``, how probable it is that each label is in the batch, as often as it
            stands in ``labels`` up to there; None where no probabilities are known.
        candidates: int64 ``(k, N)``, label multisets, each ascending, the most probable first.
        weights: float64 ``(k,)``, their probabilities relative to each other, adding up to 1.
    """

    labels: Tensor
    counts: Tensor
    method: str
    doubt: float = 0.0
    guess: bool = False
    factor: float = 1.0
    confidence: Tensor | None = None
    candidates: Tensor | None = None
    weights: Tensor | None = None

    def __str__(self) -> str:
        factor = "" if self.factor == 1 else f" times {self.factor:.3g}, which the loss does not explain"
        how = "guessed" if self.guess else "inferred"
        unsure = []
        if self.guess and self.confidence is not None:
            pairs = sorted(zip(self.confidence.tolist(), self.labels.tolist(), strict=True))
            unsure = [f"{label} ({sure:.2f})" for sure, label in pairs if sure < 0.9]
        more = f"; least certain: {', '.join(unsure[:8])}" if unsure else ""
        return f"labels were {how}: {self.method}{factor}; doubt {self.doubt:.2f}{more}"


def infer(
    model: nn.Module, observation: Observation, *, loss: Loss | None = None, samples: int = 64
) -> LabelInference:
    r"""Infer the labels of the client's images from the gradient of the layer that makes the logits.

    With cross-entropy the bias gradient of class :math:`c` is the mean of :math:`p_c - [y = c]`, so it
    is negative only for classes in the batch. For one image its smallest entry is the label. For a batch
    of :math:`N` images the counts are about :math:`N(\bar p_c - g_c)`. How the predictions of images of a
    class are distributed is estimated by running the model on photographs and noise, which tells a trained
    network from a fresh one; it gives each count of each class a probability, under the condition that all
    add up to :math:`N`, and the labels of which most are right on average are taken. Of fewer images than
    classes, one gradient step holds more: the features of every image are fitted to the gradient of the last
    layer together with its label (`invlib.attacks.demixing.demix`), and where that succeeds to rounding, the
    labels are certain; those that a loss smooths, too. Other losses of classes are asked for
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

    Where the gradient of one image shows that its label is soft (of a mixture of two images, or smoothed by
    a loss that is not told), the bias and weight gradients give its features, the features its predictions,
    and these the label, exactly. Of a loss that is told to smooth labels, they give the class.

    Where each logit has a label of its own (binary cross-entropy), the signs of one image's bias gradient
    are its labels.

    Args:
        model: the model that the client received.
        observation: what the server saw.
        loss: the client's loss; None takes the observation's, or else cross-entropy.
        samples: how many photographs and noise images estimate the predictions of a batch.

    Returns:
        The labels (exact for one image, but for the two rows above; for batches an estimate that says how
        probable each is, unless it is certain).

    Raises:
        RecoveryError: no layer is known to make the logits, the update lacks it, its gradient is zero or one
            that no labels make, or the loss takes no classes.

    Source: Zhao et al. 2020 (iDLG), arXiv 2001.02610, for one image; Wainakh et al. 2022 (LLG),
    arXiv 2105.09369, for batches.

    The probabilities of counts and the fit of features are this project's own.

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
    head = Head.of(model, observation)
    client = (
        None if hasattr(observation.protocol, "mean_gradient") else Simulated(model, observation, loss, head)
    )
    gradient = (
        head.read(observation.update[head.name]) / client.factor if client else head.mean(observation, model)
    )
    if not torch.isfinite(gradient).all():
        raise RecoveryError(f"the gradient of {head.name!r} has NaN or infinite numbers")
    if not gradient.any():
        raise RecoveryError(f"the gradient of {head.name!r} is all zero; it says nothing about the labels")
    typical = Typical(model, observation, head, samples, trains=client is not None and client.factor < 0)
    if kind == "signs":
        found = _signs(loss, gradient, typical, some)
    elif client is not None and count == 1:
        label, doubt = client.tried(gradient)
        found = _labels(label, classes, "nearest of the labels tried in the client's step", doubt)
    elif count == 1:
        whole = head.name not in observation.sent and balanced(loss, some.new_zeros(1, classes))
        found = _by_features(gradient, observation, typical, loss) or _one(gradient, typical, whole)
    else:
        parallel = client is None or client.linear
        found = _batch(loss, gradient, typical, observation, parallel=parallel, exact=client is None)
        if client is not None and not client.linear:
            some, doubt = client.exchanged(found.labels)
            found = _labels(some, classes, "counts that come nearest in the client's step", doubt)
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


def _one(gradient: Tensor, typical: Typical, whole: bool) -> LabelInference:
    """Return the label of one image, which alone has a negative factor; ``whole``: they add up to zero."""
    if gradient.ndim == 1:
        low = gradient.sort().values
        # Of a network that is sure of its label, p - 1 may be rounded to zero, where nothing else is.
        sure = whole and low[0] == 0 < low[1] and gradient.sum() <= LAST_PLACE
        if low[0] >= 0 and not sure:
            raise RecoveryError("no entry of the bias gradient is negative, as the label's is")
        label, method = int(gradient.argmin()), "smallest entry of the bias gradient"
        doubt = 0.0 if sure else max(0.0, float(low[1] / low[0]))
        whole = whole and float(gradient.sum().abs()) > LAST_PLACE
    else:
        label, method, doubt = _opposed_row(typical, gradient)
    rest = float(gradient.sum(0).norm() / gradient.reshape(len(gradient), -1).norm(dim=1).sum())
    doubt = max(doubt, rest) if whole else doubt
    if doubt > _FOREIGN and "random images" not in method:
        raise RecoveryError(
            f"one label leaves {doubt:.0%} of the gradient of {typical.head.name!r} unexplained"
        )
    return _labels(torch.tensor([label]), len(gradient), method, doubt, least=0.01)


def _opposed_row(typical: Typical, gradient: Tensor) -> tuple[int, str, float]:
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


def _signs(loss: Loss, gradient: Tensor, typical: Typical, some: Tensor) -> LabelInference:
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
    loss: Loss, gradient: Tensor, typical: Typical, observation: Observation, *, parallel: bool, exact: bool
) -> LabelInference:
    """Return the counts whose gradients at typical predictions add up to the one that was observed.

    Args:
        loss: the client's.
        gradient: of the bias or the weight.
        typical: what the network makes of random images.
        observation: what the server saw.
        parallel: it is a gradient up to a factor, and not what an optimiser such as Adam makes of it.
        exact: the client's step says how its update is a gradient; where random images had to tell, as with
            momentum, counts near it are taken, without probabilities.
    """
    count, classes = observation.num_images, len(gradient)
    source = "bias gradient" if gradient.ndim == 1 else "row sums of the weight gradient"
    per_class = (gradient if gradient.ndim == 1 else gradient.sum(1)) / typical.scale()
    logits = typical.logits()
    noisy = bool(getattr(observation.protocol, "noise", 0))  # which makes what is impossible without it
    if loss is F.cross_entropy:
        rest = float(per_class.sum().abs() / per_class.abs().sum())
        predictions = logits.softmax(-1).mean(0).double().cpu()
        fit = nearest(count * predictions, -count * per_class, per_class < 0, count)
    else:
        fit, rest = fit_of(loss, per_class, logits, observation)
        smoothing = smoothing_of(loss, classes, like(typical.model))
        if smoothing and exact and not noisy and type(observation.protocol) is FedSGD:
            begun = torch.repeat_interleave(torch.arange(classes), fit.counts)[None]
            fitted = demixed(typical, observation, begun, torch.Generator().manual_seed(0), smoothing)
            if fitted is not None and fitted.certified:
                return _certain(fitted, classes)
    scaled = fit.factor != 1 or gradient.ndim == 2
    if parallel and not noisy and (why := impossible(loss, per_class, rest, count, scaled=scaled)):
        raise RecoveryError(f"no {count} labels make the gradient of {typical.head.name!r}: {why}")
    if loss is F.cross_entropy and exact and not noisy and countable(classes, count):
        return _probable(
            fit.factor * per_class, typical, observation, f"counts from the {source}", fit.factor
        )
    labels = torch.repeat_interleave(torch.arange(classes), fit.counts)
    return _labels(labels, classes, f"counts from the {source}", max(fit.doubt, rest, 1e-6), fit.factor)


def _probable(
    per_class: Tensor, typical: Typical, observation: Observation, method: str, factor: float
) -> LabelInference:
    """Return the labels of a batch by how probable counts are, or those that alone fit the last layer."""
    count, classes = observation.num_images, len(per_class)
    logits, features = typical.seen()
    sizes, low = torch.ones(len(features), dtype=torch.float64), (per_class < 0).long()
    if typical.head.bias:
        low = torch.maximum((-count * per_class - 1e-3).ceil().long(), low)
        rows = typical.head.weight_of(observation, typical.model)
        if rows is not None and (features >= 0).all():  # only a class of the batch has an entry below zero
            low = torch.maximum(low, (rows.amin(1) < -_NEGATIVE * rows.abs().max()).long())
    else:
        sums = features.sum(1)
        sizes = 0.5 + 0.5 * sums / sums.mean()  # a client's images differ less than photographs and noise
    generator = torch.Generator().manual_seed(0)
    alike = TRAINED if _told_apart(logits.softmax(1)) > _TRAINED else FRESH
    logs = likelihoods(count * per_class, logits, sizes, low, count, alike=alike, generator=generator)
    counts = weighed(logs, MOST)
    labels, confidence = likeliest(counts.probabilities)
    known = alike is FRESH and float(confidence.min()) > _SURE
    if not known and type(observation.protocol) is FedSGD:
        fitted = demixed(typical, observation, counts.labels, generator)
        if fitted is not None and fitted.certified:
            return _certain(fitted, classes)
        if fitted is not None and factor == 1:
            method += " and the fit of features to the last layer"
            counts = _together(counts, fitted)
            labels, confidence = likeliest(counts.probabilities)
    own = (counts.labels == labels).all(1)
    order = (~own).to(torch.uint8).argsort(stable=True)  # the labels themselves come first
    candidates, weights = counts.labels[order], counts.weights[order]
    if not own.any():
        candidates, weights = torch.cat([labels[None], candidates]), torch.cat([weights[:1], weights])
    # A factor that the loss does not explain is a guess as well.
    doubt = max(1 - float(confidence.min()), 0.5 if factor != 1 else 0.0)
    return replace(
        _labels(labels, classes, method, max(doubt, 1e-6), factor),
        confidence=confidence,
        candidates=candidates,
        weights=weights / weights.sum(),
    )


def _told_apart(predictions: Tensor) -> float:
    """Return how much predictions ``(J, classes)`` tell images apart: 0 where all are the same, at most 1.

    It is the mutual information of image and class, as a share of the logarithm of the classes.
    """
    mean, each = predictions.mean(0), torch.special.entr(predictions).sum(1).mean()
    return float(torch.special.entr(mean).sum() - each) / math.log(len(mean))


def _certain(fitted: Demixed, classes: int) -> LabelInference:
    """Return the labels that alone fit the last layer."""
    labels = fitted.labels[0]
    return replace(
        _labels(labels, classes, "features and labels that alone fit the last layer", 0.0),
        confidence=torch.ones(len(labels), dtype=torch.float64),
        candidates=labels[None],
        weights=torch.ones(1, dtype=torch.float64),
    )


def _together(counts: Counts, fitted: Demixed) -> Counts:
    """Return probabilities of counts, half of them shared by multisets that nearly fit the last layer."""
    weights = fitted.misfit.clamp_min(1e-12) ** -2
    weights = weights / weights.sum()
    classes = len(counts.probabilities)
    table = torch.zeros_like(counts.probabilities)
    for labels, weight in zip(fitted.labels, weights, strict=True):
        table[torch.arange(classes), torch.bincount(labels, minlength=classes)] += weight
    order = weights.argsort(descending=True)
    return Counts(
        probabilities=(counts.probabilities + table) / 2, labels=fitted.labels[order], weights=weights[order]
    )


def _by_features(
    gradient: Tensor, observation: Observation, typical: Typical, loss: Loss
) -> LabelInference | None:
    """Return the label of one image that is soft, or smoothed by the loss; None where it is neither.

    It is None, too, where the last layer does not tell.
    """
    head, rows = typical.head, typical.head.weight_of(observation, typical.model)
    if not head.bias or rows is None or type(observation.protocol) is not FedSGD:
        return None
    classes = len(gradient)
    if (smoothing := smoothing_of(loss, classes, like(typical.model))) is None:
        return None
    params = typical.ends[0]
    weight = head.rows(params[head.names[1]])
    features = gradient @ rows / gradient.square().sum()
    if (torch.outer(gradient, features) - rows).norm() > 1e-3 * rows.norm():
        return None
    logits, inputs = typical.seen()
    bias = params[head.name].double().cpu().flatten()
    if inputs.shape[1] != len(features) or not torch.allclose(
        inputs @ weight.T + bias, logits, rtol=1e-3, atol=1e-3
    ):
        return None
    predicted = (features @ weight.T + bias).softmax(0)
    label = predicted - gradient
    hard = predicted - F.one_hot(gradient.argmin(), classes)  # which a factor may have made shorter
    if gradient.sum().abs() > 1e-3 * gradient.abs().sum() or label.min() < -1e-3:
        return None  # no label of cross-entropy
    if smoothing:
        own = (1 - smoothing) * F.one_hot(label.argmax(), classes) + smoothing / classes
        found = _labels(label.argmax()[None], classes, "prediction of the features in the gradient", 0.0)
        return found if (label - own).abs().max() < 1e-3 else None
    if F.cosine_similarity(hard, gradient, dim=0) > 1 - 1e-6:
        return None
    return LabelInference(
        labels=label.clamp_min(0)[None].to(like(typical.model)),
        counts=(label == label.max()).long(),
        method="soft label, by the predictions that the features in the gradient make",
    )


def ranked_labels(
    model: nn.Module, observation: Observation, *, most: int = 16, loss: Loss | None = None
) -> tuple[Tensor, Tensor]:
    """Return the label multisets that a batch may have, the most probable first, and their weights.

    Args:
        model: the model that the client received.
        observation: what the server saw.
        most: how many at most.
        loss: as for `infer`.

    Returns:
        Labels int64 ``(k, N)``, each row ascending and different, the first those of `infer`; and float64
        ``(k,)``, their probabilities relative to each other, which add up to 1.

    Raises:
        RecoveryError: as for `infer`.
    """
    found = infer(model, observation, loss=loss)
    if found.candidates is None or found.weights is None:
        return found.labels[None], torch.ones(1, dtype=torch.float64)
    weights = found.weights[:most]
    return found.candidates[:most].to(found.labels.device), weights / weights.sum()


def contradiction(model: nn.Module, observation: Observation) -> str | None:
    """Return how the labels that were given contradict the update, in a sentence; None where they do not.

    Only classes in a batch have negative entries in the bias gradient of the logits, and the sum of the
    others is not negative.
    """
    labels, loss = observation.labels, observation.loss or F.cross_entropy
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        return None
    if getattr(observation.protocol, "noise", 0):  # of either sign
        return None
    try:
        model = unwrapped(model)
        head = Head.of(model, observation)
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
