"""Saturated losses: a network that is sure of a label sends a gradient whose factor has all but vanished."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from invlib.attacks.losses import slope
from invlib.autodiff.odds import log_odds
from invlib.core.network import classifier, in_mode, num_classes
from invlib.core.observation import Loss, Observation, words_of
from invlib.errors import ConfigError, RecoveryError
from invlib.federated import FedSGD
from invlib.optim.objectives import Objective, scale_free

SATURATED = 1e-3  # one minus the label's probability, from which on down log-odds take the loss's place
_ROUNDING = 4  # last places of a probability near 1 by which a client's own may be wrong
_SAME = 1e-8  # cosine distance of two directions that differ by single precision alone

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
    one_class = labels is not None and labels.shape == (1,) and not labels.is_floating_point()
    if asked is False or (asked is None and not one_class):
        return None
    slopes = head_slopes(model, observation) if one_class else None
    if asked is None and (slopes is None or unsure(slopes, int(labels)) > SATURATED):  # type: ignore[arg-type]
        return None
    noise = torch.rand(1, *observation.image_shape, generator=torch.Generator().manual_seed(0))
    inputs = observation.normalization.encode(noise.to(target[0]))

    def step(loss: Loss) -> list[Tensor]:
        with in_mode(model, training=observation.training_mode, seed=0):
            return update(inputs, labels, loss=loss)

    assert observation.loss is not None
    classes = num_classes(model, observation.image_shape)
    why = obstacle(observation, observation.loss, labels, classes, step)
    if why is None and not any(part.any() for part in target):
        return None
    if why is None and not scale_free(objective, target):
        why = f"a factor changes the objective {getattr(objective, '__name__', objective)}"
    if why is None:
        eps = torch.finfo(target[0].dtype).eps
        return 1.0 if slopes is None else label_share(slopes, int(labels), eps)  # type: ignore[arg-type]
    if asked:
        raise ConfigError(f"GradientMatching log_odds is True, and {why}; expected None or False")
    return None


def head_slopes(model: nn.Module, observation: Observation) -> Tensor | None:
    """Return the mean gradient of the logits' bias, ``(classes,)`` in float64, or None where it is not seen.

    Of one image and cross-entropy it is ``p - e_y``.
    """
    with suppress(RecoveryError):
        name = classifier(model)[1]
        if name is not None:
            return observation.mean_gradient(name).detach().double().flatten().cpu()
    return None


def unsure(slopes: Tensor, label: int) -> float:
    """Return one minus the probability of the label, from the slopes of one image's logits."""
    return max(float(slopes.sum() - slopes[label]), -float(slopes[label]))


def label_share(slopes: Tensor, label: int, eps: float) -> float:
    r"""Return :math:`\alpha` of `invlib.autodiff.odds.log_odds`: how the client's rounding left its label.

    The slopes of one image's logits add up to zero, but for the label's, ``p - 1``, which is rounded to the
    last place of a number near 1. Where more than that is missing it is not rounding, and 1 is returned.
    """
    others = float(slopes.sum() - slopes[label])
    if others <= 0 or abs(float(slopes.sum())) > _ROUNDING * eps:
        return 1.0
    return -float(slopes[label]) / others


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
    if len(labels) != 1:
        return f"there are {len(labels)} images, each with a factor of its own"
    some = next(iter(observation.update.values()))
    logits = torch.randn(1, classes, generator=torch.Generator().manual_seed(0)).to(some)
    given, wanted = (slope(one, logits, labels.to(some.device)) for one in (loss, log_odds))
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
