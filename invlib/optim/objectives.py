"""How far a candidate's update is from the observed one: ``(candidate, target) -> scalar``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from invlib import kernels
from invlib.errors import ConfigError
from invlib.kernels.checks import check_lists
from invlib.settings import Checked, Count, taking

Tensors = Sequence[Tensor]
Objective = Callable[..., Tensor]
Compared = Annotated[Objective, taking("a function (candidate, target) -> scalar", 2)]

TAG = 0.1  # weight of the absolute distance in the first tensor


def cosine(candidate: Tensors, target: Tensors, weights: Sequence[float] | None = None) -> Tensor:
    r"""Return one minus the cosine similarity of two updates, each taken as one long vector.

    .. math:: 1 - \frac{\sum_i w_i \langle c_i, t_i\rangle}
                       {\sqrt{\sum_i w_i \|c_i\|^2}\,\sqrt{\sum_i w_i \|t_i\|^2}}

    Args:
        candidate: the update of the guess, a list of tensors.
        target: the observed update, tensors of the same shapes.
        weights: one number per tensor; None weighs all alike.

    Returns:
        A scalar in [0, 2]; 1 where either update is all zero.

    Raises:
        ConfigError: the lists differ in length or shapes.

    Source: Geiping et al. 2020, arXiv 2003.14053, equation 4.

    Taught in: chapter 2
    """
    dot, candidate_sq, target_sq = kernels.gradient_statistics(candidate, target, weights)
    # The floor keeps the square root's slope finite where a gradient vanishes; the root is taken of each
    # norm before they are multiplied, since the product of two tiny squares would underflow in float32.
    tiny = torch.finfo(dot.dtype).tiny
    return 1 - dot / candidate_sq.clamp_min(tiny).sqrt() / target_sq.clamp_min(tiny).sqrt()


def chordal(candidate: Tensors, target: Tensors, weights: Sequence[float] | None = None) -> Tensor:
    r"""Return half the squared distance of two updates' directions: `cosine` without its cancellation.

    .. math:: \tfrac12 \sum_i w_i \left\| \frac{c_i}{\|c\|} - \frac{t_i}{\|t\|} \right\|^2, \quad
              \|c\|^2 = \sum_i w_i \|c_i\|^2

    Arguments and errors as for `cosine`, which it equals; single precision loses a cosine distance below
    1e-7, and of this one nothing.
    """
    _, candidate_sq, target_sq = kernels.gradient_statistics(candidate, target, weights)
    tiny = torch.finfo(candidate_sq.dtype).tiny
    to, of = (square.clamp_min(tiny).rsqrt() for square in (candidate_sq, target_sq))
    pairs = [c * to for c in candidate], [t * of for t in target]
    return kernels.squared_difference(*pairs, weights) / 2


def scale_free(objective: Objective, target: Tensors) -> bool:
    """Say whether an objective does not change when the candidate is multiplied by a number above zero."""
    some = [torch.cos(torch.arange(t.numel(), device=t.device)).to(t).view_as(t) for t in target]
    one, other = objective(some, target), objective([4 * c for c in some], target)
    return bool((one - other).abs() <= 1e-5 * one.abs())


def l2(candidate: Tensors, target: Tensors, weights: Sequence[float] | None = None) -> Tensor:
    r"""Return the squared Euclidean distance :math:`\sum_i w_i \|c_i - t_i\|^2` of two updates.

    Arguments and errors as for `cosine`.

    Source: Zhu et al. 2019 (deep leakage from gradients), arXiv 1906.08935, equation 4.

    Taught in: chapter 2
    """
    return kernels.squared_difference(candidate, target, weights)


def l1(candidate: Tensors, target: Tensors, weights: Sequence[float] | None = None) -> Tensor:
    r"""Return the absolute distance :math:`\sum_i w_i \|c_i - t_i\|_1` of two updates.

    Arguments and errors as for `cosine`.
    """
    return _sum(candidate, target, weights, lambda c, t: (c - t).abs().sum())


def maximum(candidate: Tensors, target: Tensors, weights: Sequence[float] | None = None) -> Tensor:
    r"""Return :math:`\sum_i w_i \max |c_i - t_i|`, the largest difference in each tensor, added up.

    Arguments and errors as for `cosine`.
    """
    return _sum(candidate, target, weights, lambda c, t: (c - t).abs().max())


def layerwise_cosine(candidate: Tensors, target: Tensors, weights: Sequence[float] | None = None) -> Tensor:
    r"""Return :math:`\sum_i w_i (1 - \cos(c_i, t_i))`: the direction of every tensor counts by itself.

    Arguments and errors as for `cosine`.

    Taught in: chapter 2
    """
    return _sum(candidate, target, weights, lambda c, t: cosine([c], [t]))


def tag(candidate: Tensors, target: Tensors, weights: Sequence[float] | None = None) -> Tensor:
    r"""Return the squared distance of two updates and a part of the absolute one, more of it in early layers.

    .. math:: \sum_i w_i \big(\|c_i - t_i\|^2 + \alpha_i \|c_i - t_i\|_1\big), \quad
              \alpha_i = 0.1\, (n - i) / n, \quad i = 0, \dots, n - 1

    Arguments and errors as for `cosine`. It was made for transformers that read text; how :math:`\alpha_i`
    falls from layer to layer is not in the paper and follows `Layers`.

    Source: Deng et al. 2021 (TAG), arXiv 2103.06819.
    """
    factors, n = check_lists(candidate, target, weights), len(target)
    falling = [w * TAG * (n - i) / n for i, w in enumerate(factors)]
    return l2(candidate, target, weights) + l1(candidate, target, falling)


@dataclass(frozen=True, repr=False)
class Masked(Checked):
    """An objective that compares two updates only where the observed one is not zero.

    A client that sends its largest numbers alone, or prunes, sends zeros for the rest, and they say nothing
    of its image: the guess's update need not be zero there.

    Args:
        objective: compares what is left; any ``(candidate, target, weights=None) -> scalar``.

    Raises:
        ConfigError: when an attack begins, where all that it compares is zero.

    Example:
        >>> sent, guess = [torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 5.0])]
        >>> float(l2(guess, sent)), float(Masked(l2)(guess, sent))
        (25.0, 0.0)

    Taught in: chapter 2
    """

    objective: Compared

    def __call__(self, candidate: Tensors, target: Tensors, weights: Sequence[float] | None = None) -> Tensor:
        """Return the objective of two updates whose numbers are zero where the target's are."""
        check_lists(candidate, target, weights)
        sent = [torch.where(t != 0, c, 0) for c, t in zip(candidate, target, strict=True)]
        return self.objective(sent, target) if weights is None else self.objective(sent, target, weights)

    def __repr__(self) -> str:
        return f"Masked({getattr(self.objective, '__name__', repr(self.objective))})"

    def check(self, target: Tensors) -> None:
        """Raise `ConfigError` where there is nothing to compare."""
        if not any(bool(t.any()) for t in target):
            raise ConfigError(
                f"{self!r} has nothing to compare: all {sum(t.numel() for t in target)} numbers of the "
                "update are 0; expected some that are not"
            )


def _sum(
    candidate: Tensors,
    target: Tensors,
    weights: Sequence[float] | None,
    distance: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    factors = check_lists(candidate, target, weights)
    parts = [w * distance(c, t) for w, c, t in zip(factors, candidate, target, strict=True)]
    return torch.stack(parts).sum()


@dataclass(frozen=True, kw_only=True)
class Layers(Checked):
    """Which tensors of an update an attack compares, and how much each counts.

    Args:
        which: ``"all"``, the ``"first"`` or ``"last"`` ones in the model's order, or the ``"largest"``
            by norm in the observed update.
        count: how many; None only with ``which="all"``.
        weights: ``"equal"``; ``"linear"``, falling from 1 to 1/n; or ``"exponential"``, each about a
            third (1/e) of the one before. The first tensor counts most.

    Raises:
        ConfigError: an unknown choice, or a count that does not fit it.

    Example:
        >>> Layers(which="last", count=2).choose([torch.ones(3)] * 5)
        ([3, 4], None)
    """

    which: Literal["all", "first", "last", "largest"] = "all"
    count: Count | None = None
    weights: Literal["equal", "linear", "exponential"] = "equal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.which == "all") != (self.count is None):
            raise ConfigError(
                f"Layers which={self.which!r} has count={self.count}; expected a positive count, "
                "and none with which='all'"
            )

    def choose(self, target: Tensors) -> tuple[list[int], list[float] | None]:
        """Return the indices of the chosen tensors and their weights (None where all weigh alike)."""
        n = len(target)
        if self.which == "largest":
            assert self.count is not None
            norms = torch.stack([t.norm() for t in target])
            indices = norms.topk(min(self.count, n)).indices.tolist()
        elif self.which == "last":
            assert self.count is not None
            indices = list(range(n))[-self.count :]
        else:
            indices = list(range(n))[: self.count]
        if self.weights == "equal":
            return indices, None
        ramp = torch.arange(n, 0, -1, dtype=torch.float32)
        factors = ramp / n if self.weights == "linear" else ramp.softmax(0) / ramp.softmax(0)[0]
        return indices, [float(factors[i]) for i in indices]
