"""What a client's loss does with labels, asked of the loss at logits, without a network."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from invlib.core.observation import Loss, words_of
from invlib.errors import ConfigError, RecoveryError

LAST_PLACE = 2.0**-22  # by which single precision may round a probability near 1, with room
_MOST = 20_000_000  # numbers in the gradients that are averaged

Kind = Literal["none", "classes", "signs"]


def slope(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor | None:
    """Return the gradient of a loss with respect to logits; None where it does not take such targets."""
    logits = logits.detach().requires_grad_()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.autograd.grad(loss(logits, targets), logits, materialize_grads=True)[0]
        except Exception:  # whatever a loss of the user's raises
            return None


def kind_of(loss: Loss, count: int, classes: int, like: Tensor) -> Kind | None:
    """Say what a loss takes for labels.

    Args:
        loss: the client's.
        count: how many images it used.
        classes: how many logits each has.
        like: a tensor of the model's type, on its device.

    Returns:
        ``"none"``: it takes no notice of them; ``"classes"``: int64 ``(N,)``, each raising its own logit;
        ``"signs"``: zeros and ones, each of which pushes its logit down or up whatever it is, as
        `torch.nn.functional.binary_cross_entropy_with_logits` does. None is another loss, as of regression.
    """
    if loss is F.cross_entropy:
        return "classes" if classes > 1 else None
    logits = 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(0)).to(like)
    either = [[slope(loss, logits, t) for t in some] for some in _zeros_and_ones(logits)]
    if all(a is not None and b is not None and torch.equal(a, b) for a, b in either):
        return "none"
    if classes > 1:
        own, flat = torch.arange(classes, device=like.device), logits.new_zeros(classes, classes)
        one, other = slope(loss, flat, own), slope(loss, flat, own.roll(-1))
        if one is not None and other is not None and 2 * ((one - other).argmin(1) == own).sum() > classes:
            return "classes"
    signs = any(a is not None and b is not None and (a > 0).all() and (b < 0).all() for a, b in either)
    return "signs" if signs else None


def _zeros_and_ones(logits: Tensor) -> list[list[Tensor]]:
    whole = [logits.new_full((len(logits),), k, dtype=torch.int64) for k in (0, 1)]
    return [[torch.zeros_like(logits), torch.ones_like(logits)], whole]


def binary_labels(loss: Loss, ones: Tensor, like: Tensor) -> Tensor:
    """Return zeros and ones ``(N, classes)`` in the form that a loss takes: float, or int64 ``(N,)``."""
    fits = slope(loss, torch.zeros_like(ones, dtype=like.dtype), ones.to(like.dtype)) is not None
    return ones.to(like.dtype) if fits else ones[:, 0].to(torch.int64)


def class_slopes(loss: Loss, logits: Tensor) -> Tensor:
    """Return the mean gradient at some logits for each class, ``(classes, classes)``, a row for each label.

    It is that of a batch of one image of each class, in float64 on the CPU. Of very many classes only some
    of the logits are used.

    Raises:
        RecoveryError: the loss does not run on such a batch.
    """
    classes = logits.shape[1]
    logits = logits[:: 1 + len(logits) * classes**2 // _MOST]
    labels = torch.arange(classes, device=logits.device)
    total = torch.zeros(classes, classes, dtype=torch.float64)
    for row in logits:
        part = slope(loss, row.expand(classes, -1), labels)
        if part is None:
            raise RecoveryError(f"the loss {words_of(loss)} does not run on a batch of {classes} images")
        total += part.double().cpu()
    return total / len(logits)


def smoothing_of(loss: Loss, classes: int, like: Tensor) -> float | None:
    r"""Return the label smoothing of a mean cross-entropy, 0 where it has none; None of another loss.

    Its slope is :math:`p - (1 - s)\, e_y - s / C` at any logits.

    Args:
        loss: the client's.
        classes: how many logits there are.
        like: a tensor of the model's type, on its device.
    """
    if loss is F.cross_entropy:
        return 0.0
    own = torch.arange(classes, device=like.device)
    logits = 3 * torch.randn(classes, classes, generator=torch.Generator().manual_seed(0)).to(like)
    part = slope(loss, logits, own)
    if part is None or classes < 2:
        return None
    targets = (logits.softmax(1) - classes * part).double()
    smoothing = 1 - float(targets.diagonal().mean() - targets[own, own.roll(1)].mean())
    wanted = (1 - smoothing) * torch.eye(classes).to(targets) + smoothing / classes
    close = -1e-4 < smoothing < 0.99 and torch.allclose(targets, wanted, rtol=0, atol=1e-4)
    return max(0.0, smoothing) if close else None


def balanced(loss: Loss, logits: Tensor) -> bool:
    """Say whether the gradients of a loss of classes add up to zero over the classes, at some logits."""
    if loss is F.cross_entropy:
        return True
    rows = class_slopes(loss, logits)
    return bool(rows.sum(1).abs().max() < 1e-3 * rows.abs().sum(1).max())


def batch_scale(
    loss: Loss, labels: Tensor, batches: Sequence[slice | list[int]], like: Tensor, rows: Tensor
) -> float:
    """Return the factor from `class_slopes` of an image to what the image adds to the mean gradient.

    A mean over ``N`` images, a sum and class weights differ in it.

    Args:
        loss: the client's.
        labels: int64 ``(N,)``.
        batches: which images each local step uses.
        like: a tensor of the model's type, on its device.
        rows: `class_slopes` at logits of zero.

    Raises:
        RecoveryError: the loss does not run on such a batch, or is no sum over its images.
    """
    along = length = 0.0
    for chosen in batches:
        own = labels[chosen]
        part = slope(loss, like.new_zeros(len(own), len(rows)), own.to(like.device))
        if part is None:
            raise RecoveryError(f"the loss {words_of(loss)} does not run on a batch of {len(own)} images")
        given, expected = part.double().cpu(), rows[own]
        dot, square = float((given * expected).sum()), float(expected.square().sum())
        if (given - dot / max(square, 1e-300) * expected).norm() > 0.01 * given.norm():
            raise RecoveryError(f"the loss {words_of(loss)} is no sum over the images of a batch")
        along, length = along + dot / len(batches), length + square / len(batches)
    # Images that a step leaves out count as if it used them at an equal share.
    used = sum(len(labels[chosen]) for chosen in batches) / len(batches)
    return along / max(length, 1e-300) * used / len(labels)


def taking_probabilities(loss: Loss, count: int, classes: int, like: Tensor) -> tuple[Loss, tuple[str, ...]]:
    """Return a loss that takes probabilities ``(N, classes)`` for labels, as optimised ones are, and doubts.

    Raises:
        ConfigError: the client's loss does not, or there is one logit, whose softmax is always 1.
    """
    chosen = _soft_nll if loss is F.nll_loss else loss
    even = like.new_full((count, classes), 1 / classes)
    if classes > 1 and slope(chosen, torch.zeros_like(even), even) is not None:
        if chosen is _soft_nll or kind_of(loss, count, classes, like) == "classes":
            return chosen, ()
        return chosen, (
            f"labels were sought among probabilities of classes, and {words_of(loss)} takes others too",
        )
    why = "the model has one logit" if classes == 1 else f"{words_of(loss)} does not take them"
    raise ConfigError(
        f'labels="optimize" hands probabilities (N, classes) to the loss, and {why}; expected labels that '
        "are given, or a loss that takes probabilities, as cross-entropy does"
    )


def _soft_nll(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of soft labels, for `torch.nn.functional.nll_loss`."""
    return -(labels * log_probabilities).sum(-1).mean()
