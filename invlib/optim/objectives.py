"""How far a candidate's update is from the observed one: ``(candidate, target) -> scalar``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from invlib import kernels
from invlib.errors import ConfigError
from invlib.kernels.checks import check_lists

Tensors = Sequence[Tensor]
Objective = Callable[..., Tensor]


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
class Layers:
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
    count: int | None = None
    weights: Literal["equal", "linear", "exponential"] = "equal"

    def __post_init__(self) -> None:
        if self.which not in ("all", "first", "last", "largest"):
            raise ConfigError(f"Layers which is {self.which!r}; expected 'all', 'first', 'last' or 'largest'")
        if self.weights not in ("equal", "linear", "exponential"):
            raise ConfigError(
                f"Layers weights is {self.weights!r}; expected 'equal', 'linear' or 'exponential'"
            )
        if (self.which == "all") != (self.count is None) or (self.count is not None and self.count < 1):
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
