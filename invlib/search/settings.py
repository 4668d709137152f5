"""What the loop of a search is told: how long, how many restarts, and what runs the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from invlib.autodiff.smoothing import Smoothing
from invlib.optim.optimizers import Optimizer
from invlib.optim.schedules import geometric

EngineName = Literal["auto", "eager", "batched", "graphed"]


class Schedule(Protocol):
    """How the step size changes, such as `invlib.StepDecay`."""

    def factor(self, step: int, steps: int) -> float:
        """Return the factor of the step size at a step, counted from 0, of a run of so many steps."""
        ...


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The settings of an attack that its search reads; each means what it does in the attack.

    The last two are about running, and change no result but by rounding.
    """

    optimizer: Optimizer
    steps: int
    decay: Schedule | None
    restarts: int
    smoothing: Smoothing | None
    fading: float
    median_every: int | None
    keep: Literal["best", "last"]
    tolerance: float | None
    patience: int | None
    prune: bool
    record_every: int
    chunk: int | None
    engine: EngineName

    @property
    def comparable(self) -> bool:
        """Whether costs of different steps compare: neither the network nor the priors' weights change."""
        return self.smoothing is None and self.fading == 1

    def sharpness(self, step: int) -> float | None:
        """Return the sharpness of the softplus in the place of ReLU at a step; None keeps ReLU."""
        if self.smoothing is None or step >= self.steps:
            return None
        return self.smoothing.sharpness(step, self.steps)

    def prior_factor(self, step: int) -> float:
        """Return the factor of the priors' weights at a step."""
        return geometric(1.0, self.fading, min(step / max(self.steps - 1, 1), 1.0))

    def step_factor(self, step: int) -> float:
        """Return the factor of the step size at a step."""
        return 1.0 if self.decay is None else self.decay.factor(step, self.steps)
