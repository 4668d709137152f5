"""Saturated losses: a network that is sure of a label sends a gradient whose factor has all but vanished."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from invlib.attacks.losses import LAST_PLACE, slope
from invlib.autodiff.gradients import PLAIN, GradientMode
from invlib.autodiff.odds import log_odds
from invlib.core.calls import logits_layer
from invlib.core.network import classifier, in_mode, num_classes
from invlib.core.observation import Loss, Observation, words_of
from invlib.errors import ConfigError, RecoveryError
from invlib.federated import FedSGD
from invlib.optim.objectives import Objective, scale_free
from invlib.search.problem import Update

# One minus the label's probability, from which on down log-odds take the loss's place: there the rounding of
# the probability turns a gradient as far as that of a cosine in single precision can tell.
SATURATED = 1e-4
_SAME = 1e-8  # cosine distance of two directions that differ by single precision alone

_LOST = 0.1  # share of the labels' slopes that a batch may have lost by rounding
_LEAST = 0.01  # weight of an image as a share of the largest

Step = Callable[[Loss], list[Tensor]]


def share_of_label(
    asked: bool | None,
    model: nn.Module,
    observation: Observation,
    labels: Tensor | None,
    objective: Objective,
    target: list[Tensor],
    update: Callable[..., list[Tensor]],
) -> float | None:
    """Return `alpha` of the log-odds that take the place of the client's loss; None where the loss stays.

    Args:
        asked: whether they are to; None leaves it to the update.
        model: the model that the client received.
        observation: what the server saw, with the loss that counts.
        labels: of the images; None where they are optimised.
        objective: what compares two updates.
        target: the parts of the observed update that it compares.
        update: the client's step, ``(inputs, labels, loss=...)``, as the same parts.

    Raises:
        ConfigError: they are asked for and cannot take its place.
    """
    hard = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
    slopes = head_slopes(model, observation) if hard and asked is not False else None
    by_itself = slopes is not None and saturated(slopes, observation.num_images)
    if not (by_itself if asked is None else asked):
        return None
    if slopes is not None and not _makes_logits(model, observation):
        if asked is None:
            return None
        slopes = None
    noise = torch.rand(1, *observation.image_shape, generator=torch.Generator().manual_seed(0))
    inputs = observation.normalization.encode(noise.to(target[0]))

    def step(loss: Loss) -> list[Tensor]:
        with in_mode(model, training=observation.training_mode, seed=0):
            return update(inputs, labels[:1], loss=loss)  # type: ignore[index] # checked before it is called

    assert observation.loss is not None
    why = obstacle(observation, observation.loss, labels, num_classes(model, observation.image_shape), step)
    if why is None and not any(part.any() for part in target):
        return None
    if why is None and not scale_free(objective, target):
        why = f"a factor changes the objective {getattr(objective, '__name__', objective)}"
    if why is None:
        assert labels is not None
        if slopes is None or len(labels) > 1:
            return 1.0
        return label_share(slopes, int(labels))
    if asked:
        raise ConfigError(f"GradientMatching log_odds is True, and {why}; expected None or False")
    return None


def weighed(update: Update, target: list[Tensor]) -> Update:
    r"""Return the client's step on a batch with a weight of its own for each image, the best it can have.

    Of log-odds an image's gradient :math:`g_i` lacks the factor :math:`1 - p_i`, which the sum
    :math:`\sum_i w_i g_i` gives back: :math:`w` is at each call the solution of least squares against the
    target, with no entry below a small share of the largest, so that every image goes on. What is fitted
    need not be differentiated, since its slope is zero there.

    Args:
        update: the step on one image.
        target: the parts of the observed update.
    """
    sent = torch.cat([part.flatten() for part in target])

    def step(
        inputs: Tensor,
        targets: Tensor,
        params: dict[str, Tensor] | None = None,
        mode: GradientMode = PLAIN,
    ) -> list[Tensor]:
        each = [update(inputs[k : k + 1], targets[k : k + 1], params, mode) for k in range(len(inputs))]
        lead = 1 if mode.kind in ("mapped", "stacked") else 0  # a dimension of restarts
        rows = torch.stack([torch.cat([p.detach().flatten(lead) for p in one], lead) for one in each], lead)
        weights = _nonnegative(rows @ rows.mT, rows @ sent).unbind(lead)
        shaped = [
            [part * w.view(-1, *[1] * (part.ndim - 1)) if lead else part * w for part in one]
            for one, w in zip(each, weights, strict=True)
        ]
        return [torch.stack(parts).sum(0) for parts in zip(*shaped, strict=True)]

    return step


def _nonnegative(gram: Tensor, along: Tensor) -> Tensor:
    """Minimise ``w @ gram @ w / 2 - along @ w`` over weights above zero: those that are not are left out.

    What is left out, or far below the largest, is given a small share of the largest all the same.
    """
    some, eye = gram.double(), torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    scale = some.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None].clamp_min(torch.finfo(gram.dtype).tiny)
    some = some / scale + torch.finfo(gram.dtype).eps * eye  # two of the images may be the same
    kept = torch.ones_like(along, dtype=torch.bool)
    for _ in range(along.shape[-1]):
        pairs = kept.unsqueeze(-1) & kept.unsqueeze(-2)
        found = torch.linalg.solve(torch.where(pairs, some, eye), torch.where(kept, along.double(), 0))
        kept = kept & (found > 0)
    found = torch.where(kept, found, 0)
    largest = found.amax(-1, keepdim=True)
    return torch.where(largest > 0, found.clamp_min(_LEAST * largest), 1).to(gram)


def head_slopes(model: nn.Module, observation: Observation) -> Tensor | None:
    """Return the mean gradient of the logits' bias, ``(classes,)`` in float64, or None where it is not seen.

    Of one image and cross-entropy it is ``p - e_y``.
    """
    with suppress(RecoveryError):
        name = classifier(model)[1]
        if name is not None:
            return observation.mean_gradient(name, model).detach().double().flatten().cpu()
    return None


def _makes_logits(model: nn.Module, observation: Observation) -> bool:
    """Say whether the layer that was registered last is the one that makes the logits."""
    with suppress(RecoveryError), in_mode(model, training=False):
        return logits_layer(model, observation.image_shape).bias == classifier(model)[1]
    return False


def saturated(slopes: Tensor, count: int) -> bool:
    """Say whether the slopes of logits are of labels that a network is sure of, and still show in them.

    Of one image it does not matter whether the label does. Of a batch it does: which label has lost how much
    of its slope by rounding is not told.
    """
    return unsure(slopes) <= SATURATED and (count == 1 or abs(float(slopes.sum())) <= _LOST * unsure(slopes))


def unsure(slopes: Tensor) -> float:
    """Return one minus the probability of the label, or its mean over a batch, from the slopes of logits.

    Of images that take each other for their classes, part of it cancels.
    """
    return max(float(slopes.clamp_min(0).sum()), -float(slopes.clamp_max(0).sum()))


def label_share(slopes: Tensor, label: int) -> float:
    r"""Return :math:`\alpha` of `invlib.autodiff.odds.log_odds`: how the client's rounding left its label.

    The slopes of one image's logits add up to zero, but for the label's, ``p - 1``, which is rounded to the
    last place of a number near 1. Where that does not explain what is missing, 1 is returned.
    """
    others, own = float(slopes.sum() - slopes[label]), -float(slopes[label])
    rounded = others > 0 and abs(own - others) <= LAST_PLACE and 0 <= own <= 3 * others
    return own / others if rounded else 1.0


def obstacle(
    observation: Observation, loss: Loss, labels: Tensor | None, classes: int, step: Step
) -> str | None:
    """Return why log-odds may not take the place of a loss, in a clause, or None where they may.

    Args:
        observation: what the server saw.
        loss: the client's.
        labels: of the images, where they are not optimised.
        classes: how many there are.
        step: the client's update of some images by a loss.
    """
    if labels is None or labels.is_floating_point() or labels.ndim != 1 or classes < 2:
        return "the labels are no classes"
    if len(labels) > 1 and (observation.training_mode or type(observation.protocol) is not FedSGD):
        return f"{len(labels)} images are told apart in evaluation mode and FedSGD alone"
    some = next(iter(observation.update.values()))
    some = some if some.is_floating_point() else some.float()
    logits = torch.randn(1, classes, generator=torch.Generator().manual_seed(0)).to(some)
    given, wanted = (slope(one, logits, labels[:1].to(some.device)) for one in (loss, log_odds))
    if given is None or wanted is None or not _parallel([given], [wanted]):
        return f"{words_of(loss)} has other slopes than cross-entropy"
    if type(observation.protocol) is not FedSGD and not _parallel(step(log_odds), step(_faint)):
        return f"{words_of(observation.protocol)} does not send one gradient"
    return None


def _faint(logits: Tensor, labels: Tensor) -> Tensor:
    return log_odds(logits, labels) / 1024


def _parallel(one: list[Tensor], other: list[Tensor]) -> bool:
    a, b = (torch.cat([part.detach().double().flatten() for part in some]) for some in (one, other))
    length = float(a.norm() * b.norm())
    return length > 0 and 1 - float(a @ b) / length <= _SAME
