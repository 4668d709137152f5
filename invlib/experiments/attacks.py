"""The attacks that experiments compare, each with a budget of network evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from invlib.attacks.auto import Best, best
from invlib.attacks.base import Attack
from invlib.attacks.matching import GradientMatching
from invlib.attacks.published import improved_deep_leakage, inverting_gradients
from invlib.core.observation import Observation
from invlib.core.reconstruction import Callback, Reconstruction
from invlib.federated.surrogate import as_one_gradient
from invlib.optim.optimizers import LBFGS

_ITERATIONS = 20  # of L-BFGS in a step, one evaluation each


def squared_lbfgs(*, steps: int, restarts: int = 1) -> GradientMatching:
    """Return squared distance with L-BFGS and known labels, at a budget of evaluations for each restart."""
    iterations = min(_ITERATIONS, steps)
    return improved_deep_leakage(
        steps=steps // iterations, restarts=restarts, optimizer=LBFGS(max_iter=iterations)
    )


def cosine_adam(*, steps: int, restarts: int = 1, tv: float = 1e-2, **settings: Any) -> GradientMatching:
    """Return cosine objective and signed Adam, at a budget of evaluations for each restart.

    Records go on: their weight of total variation is an earlier default of `inverting_gradients`.
    """
    return inverting_gradients(steps=steps, restarts=restarts, tv=tv, **settings)


@dataclass(frozen=True, kw_only=True)
class OnTheWay:
    """An attack on a client of many local steps through one gradient on its way, see `as_one_gradient`.

    The score is measured through all local steps, so that it compares with that of an unrolled attack.

    Args:
        attack: what is run on that gradient.
    """

    attack: GradientMatching | Best

    def __call__(
        self,
        model: nn.Module,
        observation: Observation,
        *,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Reconstruction:
        """Attack an observation."""
        moved, gradient = as_one_gradient(model, observation)
        result = self.attack(moved, gradient, generator=generator, callback=callback, progress=progress)
        assert result.labels is not None  # the attack does not optimise them
        matching = self.attack.matching if isinstance(self.attack, Best) else self.attack
        score = matching.score(model, observation, result.images, result.labels)
        return replace(result, score=score, trial_scores=torch.tensor([score]))


PUBLISHED: dict[str, Callable[..., Attack]] = {
    "l2 + L-BFGS": squared_lbfgs,
    "cosine + signed Adam": cosine_adam,
}
BEST = "this project's best"
ATTACKS = PUBLISHED | {BEST: best}
