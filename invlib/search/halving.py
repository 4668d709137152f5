"""Successive halving: how many restarts run up to which step, and which of them go on."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rungs(steps: int, restarts: int, prune: bool) -> list[tuple[int, int]]:
    """Return up to which step how many restarts run: without pruning all of them to the end.

    With it, the worse half stops at every tenth of the run, until one is left for the rest.

    Example:
        >>> rungs(100, 4, prune=True)
        [(10, 4), (20, 2), (100, 1)]
    """
    plan, left, tenth = [], restarts, 1
    while prune and left > 1 and tenth < 10:
        plan.append((max(1, round(steps * tenth / 10)), left))
        left, tenth = math.ceil(left / 2), tenth + 1
    return [*plan, (steps, left)]


def survivors(costs: Tensor, running: Tensor, left: int, restarts: int) -> Tensor:
    """Return which restarts go on: of each observation's that run, those with the lowest costs.

    Args:
        costs: ``(observations * restarts,)``, the lowest cost that each restart has reached.
        running: bool, likewise: which of them have not stopped before.
        left: how many of each observation go on.
        restarts: how many each observation had.

    Returns:
        bool, in the same order. Ties go to the restart that comes first; what is not finite goes last.

    Example:
        >>> costs = torch.tensor([3.0, 1.0, torch.nan, 2.0])
        >>> survivors(costs, torch.tensor([True, True, True, False]), 2, 4).tolist()
        [True, True, False, False]
    """
    last = torch.finfo(costs.dtype).max
    costs = torch.where(running, costs.nan_to_num(nan=last, posinf=last), torch.inf).view(-1, restarts)
    order = costs.argsort(dim=1, stable=True)[:, :left]
    return torch.zeros_like(costs, dtype=torch.bool).scatter(1, order, True).flatten() & running
