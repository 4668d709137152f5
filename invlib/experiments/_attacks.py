"""The attacks that experiments compare, each with a budget of network evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from invlib.experiments._cases import Attack
from invlib.matching import GradientMatching, improved_deep_leakage, inverting_gradients
from invlib.optimizers import LBFGS
from invlib.presets import best

_ITERATIONS = 20  # of L-BFGS in a step, one evaluation each


def squared_lbfgs(*, steps: int, restarts: int = 1) -> GradientMatching:
    """Return squared distance with L-BFGS and known labels, at a budget of evaluations for each restart."""
    iterations = min(_ITERATIONS, steps)
    return improved_deep_leakage(
        steps=steps // iterations, restarts=restarts, optimizer=LBFGS(max_iter=iterations)
    )


def cosine_adam(*, steps: int, restarts: int = 1, **settings: Any) -> GradientMatching:
    """Return cosine objective and signed Adam as published, at a budget of evaluations for each restart."""
    return inverting_gradients(steps=steps, restarts=restarts, **settings)


PUBLISHED: dict[str, Callable[..., Attack]] = {
    "l2 + L-BFGS": squared_lbfgs,
    "cosine + signed Adam": cosine_adam,
}
BEST = "this project's best"
ATTACKS = PUBLISHED | {BEST: best}
