"""Whole batches, exactly: every image behind one gradient, each with a proof that needs no truth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from invlib.attacks.base import Attack, Settings, closed_form, loss_of
from invlib.attacks.certificate import (
    AT_ONCE,
    Found,
    Layer,
    Signals,
    accounted,
    certified,
    joined,
    judged,
    layer_of,
    signals_of,
    targets_of,
)
from invlib.attacks.chain import outside
from invlib.attacks.directions import Span, directions, separated, span_of
from invlib.attacks.doubts import doubted, doubts_of
from invlib.attacks.matching import GradientMatching
from invlib.core.network import (
    forward,
    in_mode,
    like,
    num_classes,
    trainable_parameters,
)
from invlib.core.observation import Observation
from invlib.core.reconstruction import Callback, Reconstruction
from invlib.errors import RecoveryError
from invlib.federated import FedSGD
from invlib.optim.optimizers import LBFGS
from invlib.optim.priors import Prior, total_variation
from invlib.settings import Positive, Rule

_SILENT = 0.02  # share of exact zeros below which an activation has none
_REFERENCES = 32  # inputs that signals before the activation are means over
_DRY = 40  # rounds that bring nothing, after which enough directions are what they are
_POLISHING = 3
_NEAR = 0.1  # of the residual of features that are worth a search
_FEATURES = 10.0  # weight of their distance beside that of the gradient
_REPLAYED = 1e-3  # distance of the whole client's step on all images, as a share, that is rounding


Proof = Callable[["Found"], "Found"]  # certifies all images together, where it can


# The search for an image of known features: of L-BFGS, whose first steps bring most.
SEARCH = GradientMatching(
    priors=((0.1, total_variation),),
    optimizer=LBFGS(line_search="strong_wolfe", history_size=50),
    decay=None,
    init="zeros",
    steps=6,
)


def exact_batch(
    *, layer: str | None = None, seconds: float = 60.0, search: Attack | None = SEARCH
) -> ExactBatch:
    r"""Return the attack that recovers whole batches from a fully connected layer with exact zeros.

    The layer's gradient :math:`G = D X` has the rank of the batch, and D's columns, zero where a unit is
    silent, are the directions of its column space with the most zeros. All of them together give every
    input. Then the server runs its own copy of the network on each: the signal that it sends back to the
    layer for one of the labels has to be that column of D. Where it is, to rounding, the image and its label
    are *certified*; of one gradient of a mean over the batch, also the image's weight has to be one in N, or
    all images together the gradient.
    Images whose units are alone active, and those that are certified, are taken out of the gradient first,
    the most exact ones before the others. So is the multiple of the weight that weight decay puts into it.

    Behind convolutions the inputs are features. They are proved in the same way, and an image is searched for
    each by itself, whose features and whose gradient of the layer are known. ``residuals`` and the note are
    then about the features, and ``certified`` is False: an image that was searched is proved by nothing.

    Args:
        layer: the layer's name; None takes the first fully connected one whose signals have zeros.
        seconds: how long to look for directions at most.
        search: the attack that looks for the image of each of the features, one image at a time; a
            `GradientMatching` is given their distance as one more prior. None leaves ``images`` empty.

    Returns:
        An attack. Its result holds the M images that were found, ``labels``, ``residuals`` (the distance of
        both signals of unit length), and ``certified``, and behind convolutions ``features``; its score is
        the share of the layer's gradient left unexplained.

    Raises:
        ConfigError: a setting is out of range.

    Source: the rank and the sparsity: Dimitrov et al. 2024 (SPEAR), arXiv 2403.03945; peeling: Shariati and
    Alambardar Meybodi 2026; directions and certificate are this project's.

    Taught in: chapter 5
    """
    return ExactBatch(layer=layer, seconds=seconds, search=search)


@dataclass(frozen=True, kw_only=True, repr=False)
class ExactBatch(Settings):
    """The attack that `exact_batch` returns."""

    layer: str | None = None
    seconds: Positive = 60.0
    search: Annotated[
        Any, Rule("an attack, or None", lambda a: a is None or (callable(a) and not isinstance(a, type)))
    ] = SEARCH

    @torch.inference_mode(mode=False)
    def __call__(
        self,
        model: nn.Module,
        observation: Observation,
        *,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Reconstruction:
        """Attack an observation; the callback is not called, since images do not come step by step.

        Raises:
            ObservationError: the observation does not fit the model.
            RecoveryError: the layer's activation has no exact zeros, its gradient shows no rank, or it was
                not sent.
        """
        began = time.perf_counter()
        model = observation.validate(model)
        doubts = doubts_of(model, observation, closed=True)
        generator = generator or torch.Generator().manual_seed(0)
        layer = layer_of(model, observation, self.layer)
        active = int(layer.weight_gradient.any(1).sum())  # all signals of so few units lie in one space
        if observation.num_images >= (most := min(active, layer.weight_gradient.shape[1])):
            raise RecoveryError(
                f"{observation.num_images} images and only {most} inputs or active outputs of {layer.name!r};"
                " expected fewer images than both, or their signals have no sparse directions of their own"
            )
        span = span_of(layer.weight_gradient, expected=observation.num_images)
        targets = targets_of(model, observation)
        signals = signals_of(model, observation, layer, targets)
        sent_back = signals(_references(layer))
        zeros = float((sent_back == 0).double().mean())
        if zeros < _SILENT:
            raise RecoveryError(
                f"{zeros:.0%} of the signals of {layer.name!r} are exactly zero; expected an activation with "
                "zeros, such as ReLU, after it (GELU, sigmoid and leaky ReLU have none)"
            )
        if num_classes(model, observation.image_shape) < 3:
            layer = replace(layer, share=1 / observation.num_images)
        if layer.bias_gradient is None and layer.share is not None:
            raise RecoveryError(
                f"{layer.name!r} has no bias and there are two classes, whose signals do not tell the scale "
                "of an image; expected a bias or more classes"
            )
        labels_of = targets.to(layer.weight_gradient.device)

        def proof(found: Found) -> Found:
            """Run the client's whole step on the images, which local steps and their order need."""
            if len(found.inputs) != observation.num_images or found.certified.any() or layer.image_of is None:
                return found
            images = _images(observation, layer, found.inputs).clamp(0, 1)
            gap = _replayed(model, observation, images, labels_of[found.labels])
            story = (*found.story, f"the client's step on all of them is {gap:.0e} from the update")
            if gap > _REPLAYED:
                return replace(found, story=story)
            every = torch.full_like(found.residuals, gap)
            return replace(found, residuals=every, certified=every <= _REPLAYED, story=story)

        with tqdm(total=span.rank, disable=not progress, desc="exact batch", unit="image") as bar:
            until = began + self.seconds
            found = _search(layer, signals, _ungated(sent_back), until, generator, proof, bar)
        if layer.share is None and _mean(observation):
            found = accounted(layer, span, signals, found, observation.num_images)
        note, more = _note(observation, layer, span, found)
        rows = torch.linalg.qr(found.inputs.T)[0]
        left = layer.weight_gradient - (layer.weight_gradient @ rows) @ rows.T
        if layer.image_of is None:
            found = found.only(found.residuals <= _NEAR)
            images, ways = _searched(
                model, observation, layer, found, signals, labels_of, self.search, generator, progress
            )
            if self.search is not None:
                found = found.only(torch.arange(len(images)))  # of a search that Ctrl-C stopped too
                note += f"; images were searched for {len(images)} of them, and are proved by nothing"
            more += [doubt for way in ways for doubt in way.warnings]
        else:
            images, ways = _images(observation, layer, found.inputs), []
            if len(images) and (cut := outside(images, fits=bool(found.certified.any()))):
                more.append(cut)
        result = closed_form(
            images.clamp(0, 1).to(like(model)),
            labels_of[found.labels],
            float(left.norm() / layer.weight_gradient.norm()),
            objective="unexplained share of the layer's gradient",
            note=note,
            began=began,
            residuals=found.residuals,
            certified=found.certified & (layer.image_of is not None),
            features=found.inputs if layer.image_of is None else None,
        )
        if any(way.status == "interrupted" for way in ways):
            result = replace(result, status="interrupted")
        result = replace(result, evaluations=sum(way.evaluations for way in ways))
        return doubted(result, [*doubts, *more])


def _mean(observation: Observation) -> bool:
    """Say whether the update is one gradient of a plain mean over the batch."""
    return isinstance(observation.protocol, FedSGD) and observation.loss in (None, F.cross_entropy)


def _images(observation: Observation, layer: Layer, inputs: Tensor) -> Tensor:
    """Return images ``(K, C, H, W)`` of a layer's inputs ``(K, d)``, not cut off to [0, 1]."""
    assert layer.image_of is not None
    rows = [layer.image_of(row) for row in inputs]
    images = torch.stack(rows) if rows else inputs.new_zeros(0)
    return observation.normalization.decode(images.view(len(rows), *observation.image_shape))


def _searched(
    model: nn.Module,
    observation: Observation,
    layer: Layer,
    found: Found,
    signals: Signals,
    labels_of: Tensor,
    search: Attack | None,
    generator: torch.Generator,
    progress: bool,
) -> tuple[Tensor, list[Reconstruction]]:
    """Search an image for each of the features, as if the client had sent this layer's gradient of it alone.

    Returns:
        Images ``(M, C, H, W)`` in [0, 1], none where there is no search, and what each search gave.
    """
    some, own = like(model), trainable_parameters(model)
    ways: list[Reconstruction] = []
    sent_back = signals(found.inputs)
    for k, features in enumerate(found.inputs if search is not None else ()):
        signal, label = sent_back[k, found.labels[k]], labels_of[found.labels[k]][None]
        parts = {f"{layer.name}.weight": signal[:, None] * features}
        if layer.bias_name is not None:
            parts[layer.bias_name] = signal
        alone = replace(
            observation,
            update={n: parts[n].to(some) if n in parts else torch.zeros_like(p) for n, p in own.items()},
            sent={n: torch.zeros_like(p, dtype=torch.bool) for n, p in own.items() if n not in parts},
            protocol=FedSGD(),
            num_images=1,
            labels=label,
            training_mode=False,
            buffers={},
            notes=(),
        )
        way = search
        if isinstance(way, GradientMatching):
            prior = _features_prior(model, layer, features.to(some))
            way = replace(way, priors=(*way.priors, (_FEATURES, prior)))
        assert way is not None
        ways.append(way(model, alone, generator=generator, progress=progress))
        if ways[-1].status == "interrupted":
            break
    images = [way.images for way in ways]
    return torch.cat(images) if images else some.new_zeros(0, *observation.image_shape), ways


def _features_prior(model: nn.Module, layer: Layer, features: Tensor) -> Prior:
    """Return the squared distance of what a layer is given from known features, as a share of theirs."""
    assert layer.module is not None
    module, params = layer.module, trainable_parameters(model)

    def prior(inputs: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        try:
            with in_mode(model, training=False):
                forward(model, params, None, inputs)
        finally:
            handle.remove()
        return (seen[-1] - features).square().sum() / features.square().sum()

    return prior


def _references(layer: Layer) -> Tensor:
    """Return inputs of about the batch's size, of which nothing is known yet: what single rows say."""
    weight, bias = layer.weight_gradient, layer.bias_gradient
    if bias is None:
        rows = weight[weight.norm(dim=1).argsort(descending=True)[:_REFERENCES]]
        return rows / rows.square().mean(1, keepdim=True).sqrt()
    kept = bias.abs().argsort(descending=True)[:_REFERENCES]
    return (weight[kept] / bias[kept, None]).clamp(-3, 3)


def _ungated(signals: Tensor) -> Tensor:
    """Return what is sent back before the activation: means of signals ``(R, L, m)`` of active units."""
    groups = signals.split(max(1, len(signals) // 4))
    means = [g.sum(0) / (g != 0).sum(0).clamp_min(1) for g in groups]
    return torch.cat(means)


def _search(
    layer: Layer,
    signals: Signals,
    sent_back: Tensor,
    until: float,
    generator: torch.Generator,
    proof: Proof,
    bar: tqdm[Any],
) -> Found:
    """Take images out of the gradient, certified ones first, till none is left or the time is over."""
    weight, bias = layer.weight_gradient, layer.bias_gradient
    whole = span = span_of(weight, expected=bar.total)
    out: list[Found] = []
    while True:
        rest = replace(layer, weight_gradient=weight, bias_gradient=bias)
        found = _alone(rest, span, signals)
        if found is None or not found.clean.any():
            other = _separate(rest, span, signals, sent_back, until, generator, proof)
            found = other if found is None or other.certified.any() else found
        # Noise may leave enough of an image in the gradient for it to be found once more.
        known = torch.cat([part.inputs for part in out]) if out else found.inputs[:0]
        last = found = found.only(~_near(found.inputs, known).any(1))
        sure = found.clean if found.clean.any() else found.certified
        sure = sure & (sure.cumsum(0) <= whole.rank - sum(len(part.inputs) for part in out))
        out.append(found.only(sure))
        bar.update(int(sure.sum()))
        left = whole.rank - sum(len(part.inputs) for part in out)
        if not sure.any() or left <= 0:
            break
        columns = signals(found.inputs[sure])[torch.arange(len(out[-1].inputs)), found.labels[sure]].T
        columns = columns * found.weights[sure]
        weight = weight - columns @ found.inputs[sure]
        bias = None if bias is None else bias - columns.sum(1)
        span = span_of(weight, expected=left)
    room = max(whole.rank - sum(len(part.inputs) for part in out), 0)
    doubtful = last.only(~sure)
    out.append(doubtful.only(doubtful.residuals.argsort()[:room]))
    return _polished(layer, signals, whole, joined(out))


def _alone(layer: Layer, span: Span, signals: Signals) -> Found | None:
    r"""Return certified inputs that single rows give: of units that are active for one of them alone.

    Row j is then :math:`\delta_j x` and its bias gradient :math:`\delta_j`. Their quotient is an image if
    it lies in the range of images, and it is the client's if the signal of it lies in the column space.
    """
    if layer.bias_gradient is None:
        return None
    size = layer.bias_gradient.abs()
    rows = (size > 1e-6 * size.max()).nonzero().flatten()
    rows = rows[size[rows].argsort(descending=True)]
    inputs = layer.weight_gradient[rows] / layer.bias_gradient[rows, None]
    fits = layer.in_range(inputs)
    rows, inputs = rows[fits], inputs[fits]
    if not len(rows):
        return None
    found = joined([certified(span, signals, some, layer.share) for some in inputs.split(AT_ONCE)])
    found = found.only(found.certified)
    found = found.only(found.residuals.argsort())
    # Several rows say the same but for rounding.
    near, keep = _near(found.inputs, found.inputs), torch.ones_like(found.certified)
    for k in range(len(keep)):
        keep[k + 1 :] &= ~near[k, k + 1 :] | ~keep[k]
    found = found.only(keep)
    return (
        replace(found, story=(f"{len(found.inputs)} from units active for them alone",))
        if keep.any()
        else None
    )


def _near(inputs: Tensor, others: Tensor) -> Tensor:
    """Say which inputs ``(K, d)`` are the same as others ``(L, d)`` but for noise, bool ``(K, L)``."""
    return torch.cdist(F.normalize(inputs), F.normalize(others)) < 1e-2


def _separate(
    layer: Layer,
    span: Span,
    signals: Signals,
    sent_back: Tensor,
    until: float,
    generator: torch.Generator,
    proof: Proof,
) -> Found:
    """Look for the directions of a span, and check what they give as soon as there are enough of them."""
    best: Found | None = None
    dry = 0
    for q, _ in directions(span, sent_back, generator, until=until):
        story = (f"{len(q)} of {span.rank} directions by their zeros",)
        if len(q) == span.rank - 1 and layer.bias_gradient is not None:
            q = _completed(q)
        if len(q) < span.rank:
            continue
        inputs, columns = separated(span, q, layer.bias_gradient)
        if layer.bias_gradient is None:
            inputs, columns = _scaled(inputs, columns, signals, span)
        found = _checked(inputs, columns, signals, span, layer.share)
        if layer.bias_gradient is not None and not found.certified.all():
            other = certified(span, signals, inputs, layer.share)
            if (new := (other.certified & ~found.certified).nonzero().flatten()).numel():
                back = signals(inputs[new])[torch.arange(len(new)), other.labels[new]]
                q = q.index_copy(0, new, F.normalize(back @ span.columns))
                inputs, columns = separated(span, q, layer.bias_gradient)
                found = _checked(inputs, columns, signals, span, layer.share)
        found = replace(found, story=story)
        if best is None or float(found.residuals.sum()) < 0.999 * float(best.residuals.sum()):
            best, dry = proof(found), 0
        else:
            dry += 1
        # Those that are certain make room for the others; where nothing is, more rounds may bring it.
        if best.certified.all() or dry >= (1 if best.clean.any() else _DRY):
            return best
    return best or replace(_checked(span.core[:0], span.columns[:, :0], signals, span), story=story)


def _checked(
    inputs: Tensor, columns: Tensor, signals: Signals, span: Span, share: float | None = None
) -> Found:
    """Compare the columns of D with the signals that the network gives for each label, up to a factor."""
    back, unit = signals(inputs), columns.T / columns.norm(dim=0)[:, None].clamp_min(1e-300)
    length = back.norm(dim=2).clamp_min(1e-300)
    along = (back * columns.T[:, None]).sum(2)
    gaps = (unit[:, None] - back / length[..., None]).norm(dim=2)
    residuals, labels = gaps.min(1) if len(inputs) else (gaps.new_zeros(0), gaps.new_zeros(0).long())
    weights = (along / length.square()).gather(1, labels[:, None])[:, 0]
    return judged(span, inputs, columns, labels, residuals, weights, share)


def _scaled(inputs: Tensor, columns: Tensor, signals: Signals, span: Span) -> tuple[Tensor, Tensor]:
    """Return inputs of which the scale is unknown at the one whose signal is nearest to their column."""
    size = inputs.square().mean(1).sqrt()
    inputs, columns = inputs / size[:, None], columns * size

    def gap(scale: Tensor) -> Tensor:
        return _checked(inputs * scale[:, None], columns / scale, signals, span).residuals

    grid = [sign * 2 ** (k / 4) for sign in (1, -1) for k in range(-10, 11)]
    near = torch.stack([gap(inputs.new_full((len(inputs),), a)) for a in grid]).argmin(0)
    middle = inputs.new_tensor(grid)[near]
    low, high = middle * 2**-0.25, middle * 2**0.25
    for _ in range(60):  # golden section, all images at once
        third = 0.381966 * (high - low)
        left, right = low + third, high - third
        nearer = gap(left) < gap(right)
        low, high = torch.where(nearer, low, left), torch.where(nearer, right, high)
    scale = (low + high) / 2
    return inputs * scale[:, None], columns / scale


def _completed(q: Tensor) -> Tensor:
    """Return directions with any one in the place of the last: an input depends on all but its own."""
    missing = torch.linalg.qr(q.T, mode="complete")[0][:, -1:].T
    return q if len(q) == q.shape[1] else torch.cat([q, missing])


def _polished(layer: Layer, signals: Signals, span: Span, found: Found) -> Found:
    """Return inputs by the network's own signals for directions, where one is missing at most."""
    sure = found.only(found.certified)
    if layer.bias_gradient is None or not span.rank - 1 <= len(sure.inputs) <= span.rank:
        return found
    inputs, rows = sure.inputs, torch.arange(len(sure.inputs))
    for _ in range(_POLISHING):
        back = signals(inputs[rows])[rows, sure.labels]
        inputs, _ = separated(span, _completed(F.normalize(back @ span.columns)), layer.bias_gradient)
    polished = certified(span, signals, inputs, layer.share)
    return replace(polished, story=found.story) if polished.certified.all() else found


def _replayed(model: nn.Module, observation: Observation, images: Tensor, labels: Tensor) -> float:
    """Return how far the client's step on these images is from its update, as a share of it."""
    some = like(model)
    with in_mode(model, training=False):
        update = observation.protocol(
            model,
            observation.normalization.encode(images.to(some)),
            labels.to(some) if labels.is_floating_point() else labels,
            loss=loss_of(F.cross_entropy, observation),
        )
    names = [name for name in update if name in observation.update and name not in observation.sent]
    pairs = [(update[n].detach().double(), observation.update[n].double()) for n in names]
    gap = math.hypot(*(float((a - b).norm()) for a, b in pairs))
    return gap / max(math.hypot(*(float(b.norm()) for _, b in pairs)), 1e-300)


def _note(observation: Observation, layer: Layer, span: Span, found: Found) -> tuple[str, list[str]]:
    """Return what there is to say of a result, and what is doubtful."""
    count, certain = len(found.inputs), int(found.certified.sum())
    decay = (
        [f"{layer.decay:.2g} times the layer's weight, by weight decay, is taken out"] if layer.decay else []
    )
    what = "images" if layer.image_of is not None else "inputs (features)"
    note = [
        f"the gradient of {layer.name!r} has rank {span.rank} (behind it its singular values fall by "
        f"{span.gap:.0e})",
        *decay,
        *found.story,
        f"{count} {what} found, {certain} certified with their labels",
    ]
    doubts = []
    if count < span.rank:
        note.append(
            f"{span.rank - count} {what} are missing: none of these is told from the others before all their "
            "directions are found"
        )
    if span.rank > observation.num_images:
        doubts.append(
            f"the gradient has rank {span.rank}: the client used more images than the "
            f"{observation.num_images} said, or its update holds more than gradients (weight decay, noise)"
        )
    if certain and hasattr(observation.protocol, "mean_gradient"):
        times = torch.where(found.certified, (found.weights * observation.num_images).round(), 1)
        note += [f"image {k} counts {int(n)} times" for k, n in enumerate(times.tolist()) if n > 1]
        accounted = int(times.sum()) + span.rank - count
    else:
        accounted = span.rank
    if accounted < observation.num_images:
        note.append(
            f"{observation.num_images - accounted} of the client's images leave no trace of their own"
        )
    return "; ".join(note), doubts
