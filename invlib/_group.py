"""Restarts that run together: their step, the best point of each, and what was recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invlib import _engines
from invlib._problem import Problem
from invlib.optimizers import select
from invlib.priors import median_filter
from invlib.reconstruction import Status

if TYPE_CHECKING:
    from invlib.matching import GradientMatching

SAVED = (
    "rows",
    "values",
    "best",
    "best_cost",
    "best_objective",
    "state",
    "step",
    "ended",
    "improved_at",
    "last_best",
    "evaluations",
    "costs",
    "objectives",
)


class Group:
    """The restarts that run together: their values, the best of each, and what was recorded."""

    def __init__(
        self,
        attack: GradientMatching,
        problem: Problem,
        measure: _engines.Measure,
        rows: list[int],
        starts: list[Tensor],
    ) -> None:
        self.attack, self.problem, self.measure, self.rows = attack, problem, measure, rows
        # Nobody needs the starting points any more, so that they are walked on where they lie.
        everyone = rows == list(range(len(starts[0])))
        self.values = starts if everyone else [start[rows] for start in starts]
        self.best = [v.clone() for v in self.values]
        self.best_cost = torch.full(
            (len(rows),), torch.inf, dtype=problem.like.dtype, device=problem.like.device
        )
        self.best_objective = self.best_cost.clone()
        self.state: dict[str, Any] = attack.optimizer.init(self.values)
        self.step = 0
        self.ended: Status | None = None
        self.improved_at: dict[int, int] = {}
        self.last_best: Tensor | None = None
        self.evaluations = torch.zeros(len(rows), dtype=torch.int64)
        self.costs: list[Tensor] = []
        self.objectives: list[Tensor] = []
        self.latest: tuple[Tensor, Tensor] | None = None

    def snapshot(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SAVED}

    def restore(self, saved: dict[str, Any]) -> None:
        for name in SAVED:
            setattr(self, name, saved[name])

    def part(self, places: list[int]) -> Group:
        """Return a group of some of these restarts, which stands where this one does."""
        index = torch.tensor(places, device=self.problem.like.device)
        group = copy.copy(self)
        group.rows = [self.rows[k] for k in places]
        group.values, group.best, group.costs, group.objectives = (
            [v[index] for v in some] for some in (self.values, self.best, self.costs, self.objectives)
        )
        group.best_cost, group.best_objective = self.best_cost[index], self.best_objective[index]
        group.last_best = None if self.last_best is None else self.last_best[index]
        group.evaluations = self.evaluations[places]
        group.state = select(self.attack.optimizer, self.state, index)
        group.latest = None
        return group

    def evaluate(self, values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return cost and gradient of every restart, and keep the best point that was measured."""
        cost, objective, gradients = self.measure(values, self.rows, self.sharpness(), self.fade())
        # Costs of different sharpness or weights do not compare: there, the latest point counts as the best.
        compare = self.attack.smoothing is None and self.attack.fading == 1
        better = cost < self.best_cost if compare else torch.isfinite(cost)
        self.best_cost = torch.where(better, cost, self.best_cost)
        self.best_objective = torch.where(better, objective, self.best_objective)
        for best, value in zip(self.best, values, strict=True):
            best.copy_(torch.where(better.view(-1, *[1] * (value.ndim - 1)), value, best))
        self.latest = (cost, objective)
        self.evaluations += 1
        return cost, gradients

    def sharpness(self) -> float | None:
        """Return how sharp the kinks of the network are at this step; None where they are as they are."""
        smoothing, steps = self.attack.smoothing, self.attack.steps
        return None if smoothing is None or self.step >= steps else smoothing.sharpness(self.step, steps)

    def fade(self) -> float:
        """Return the part of the priors' weights that counts at this step."""
        return float(self.attack.fading ** min(self.step / max(self.attack.steps - 1, 1), 1.0))

    def advance(self) -> None:
        attack = self.attack
        factor = 1.0 if attack.decay is None else attack.decay.factor(self.step, attack.steps)
        evaluate = self._recording() if self.step % attack.record_every == 0 else self.evaluate
        attack.optimizer.step(self.values, self.problem.variables, self.state, evaluate, factor)
        self.step += 1
        if attack.median_every is not None and self.step % attack.median_every == 0:
            images = self.values[0]
            images.copy_(median_filter(images.flatten(0, 1)).unflatten(0, images.shape[:2]))

    def _recording(self) -> Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]]:
        first = True

        def evaluate(values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            nonlocal first
            result = self.evaluate(values)
            if first:
                self.record()
                first = False
            return result

        return evaluate

    def record(self) -> None:
        """Record the latest cost of each restart."""
        assert self.latest is not None
        for column, values in zip((self.costs, self.objectives), self.latest, strict=True):
            column.append(values)

    def finish(self) -> None:
        """Measure where the last step led, so that it too can be the best."""
        self.evaluate(self.values)
        self.record()

    def observations(self) -> set[int]:
        """Return the numbers of the observations that these restarts are for."""
        return {row // self.attack.restarts for row in self.rows}

    def places(self, observations: set[int]) -> list[int]:
        """Return where in this group the restarts of some observations are."""
        return [k for k, row in enumerate(self.rows) if row // self.attack.restarts in observations]

    def tolerable(self) -> set[int]:
        """Return the observations of which a restart is as good as was asked for; no other has to run."""
        tolerance = self.attack.tolerance
        return set() if tolerance is None else self._where(self.best_objective <= tolerance)

    def weary(self) -> set[int]:
        """Return the observations of which no restart has improved for too long; to be asked now and then."""
        patience = self.attack.patience
        if patience is None:
            return set()
        if self.last_best is None:
            self.last_best, improved = self.best_cost, self.observations()
        else:
            improved = self._where(self.best_cost < self.last_best)
        if improved:
            places = self.places(improved)
            self.last_best = self.last_best.clone()
            self.last_best[places] = self.best_cost[places]
            self.improved_at = self.improved_at | dict.fromkeys(improved, self.step)
        return {k for k in self.observations() if self.step - self.improved_at[k] >= patience}

    def _where(self, chosen: Tensor) -> set[int]:
        """Return the observations of the chosen restarts; this waits for the device."""
        return {
            row // self.attack.restarts for row, one in zip(self.rows, chosen.tolist(), strict=True) if one
        }

    def leader(self) -> Tensor:
        """Return the best images so far of the restart that leads, in [0, 1]."""
        leader = torch.where(torch.isfinite(self.best_cost), self.best_cost, torch.inf).argmin()
        return self.problem.decode(self.problem.inputs(self.best[0][leader])).clamp(0, 1)

    def kept(self) -> list[Tensor]:
        return self.best if self.attack.keep == "best" else self.values
