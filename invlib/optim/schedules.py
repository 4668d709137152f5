"""How step sizes and weights change from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from invlib.settings import Checked, Factor, FromZero, Rule

_ASCENDING = Rule(
    "ascending numbers in (0, 1)",
    lambda at: isinstance(at, tuple) and all(0 < a < 1 for a in at) and list(at) == sorted(at),
)


def geometric(start: float, end: float, part: float) -> float:
    """Return the number at a part of the way from one positive number to another, in equal ratios.

    Args:
        start: the number at part 0.
        end: the number at part 1.
        part: in [0, 1].

    Example:
        >>> geometric(1.0, 100.0, 0.5)
        10.0
    """
    return float(start * (end / start) ** part)


@dataclass(frozen=True, kw_only=True)
class StepDecay(Checked):
    """Multiply the step size by ``gamma`` at given parts of the run.

    Args:
        at: parts of all steps, ascending in (0, 1); as published 3/8, 5/8 and 7/8.
        gamma: the factor.

    Raises:
        ConfigError: a part or the factor is out of range.

    Example:
        >>> [StepDecay().factor(k, 80) for k in (0, 30, 50, 70)] == [1.0, 0.1, 0.1**2, 0.1**3]
        True

    Source: Geiping et al. 2020, arXiv 2003.14053, supplementary material.

    Taught in: chapter 2
    """

    at: Annotated[tuple[float, ...], _ASCENDING] = (3 / 8, 5 / 8, 7 / 8)
    gamma: Factor = 0.1

    def factor(self, step: int, steps: int) -> float:
        """Return the factor of the step size at a step, counted from 0, of a run of so many steps."""
        return self.gamma ** sum(step >= int(steps * a) for a in self.at)


@dataclass(frozen=True, kw_only=True)
class CosineDecay(Checked):
    """Raise the step size from near zero for some steps, and let it fall to zero along half a cosine.

    Args:
        warmup: steps of the rise.

    Raises:
        ConfigError: warmup is negative.

    Example:
        >>> [round(CosineDecay(warmup=2).factor(k, 6), 2) for k in range(6)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]

    Source: Loshchilov and Hutter 2017, arXiv 1608.03983; with 50 steps of warm-up, Yin et al. 2021,
    arXiv 2104.07586.
    """

    warmup: FromZero = 50

    def factor(self, step: int, steps: int) -> float:
        """Return the factor of the step size at a step, counted from 0, of a run of so many steps."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return (1 + math.cos(math.pi * (step - self.warmup) / (steps - self.warmup))) / 2
