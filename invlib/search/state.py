"""Restarts that run together: where they stand, a step of all of them, and when they are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from invlib.core.reconstruction import Status
from invlib.optim import optimizers
from invlib.optim.priors import median_filter
from invlib.search.problem import Measure, Problem
from invlib.search.settings import SearchSettings


@dataclass(kw_only=True)
class RestartState:
    """Where restarts that run together stand.

    Args:
        rows: their numbers among all restarts.
        values: what is optimised, ``(R, ...)``; updated in place.
        best: the best values of each that were evaluated.
        best_cost: ``(R,)``, their cost.
        best_objective: ``(R,)``, their objective.
        optimizer: the optimiser's own state.
        step: steps done.
        evaluations: how often each restart was evaluated.
        costs: ``(R,)`` for each recorded step.
        objectives: likewise.
        ended: why they stopped before the last step; None where they did not.
        improved_at: at which step one of them was last seen to have improved.
        last_best: the lowest cost then.
        measured: whether where the last step led has been measured.
    """

    rows: list[int]
    values: list[Tensor]
    best: list[Tensor]
    best_cost: Tensor
    best_objective: Tensor
    optimizer: dict[str, Any]
    step: int = 0
    evaluations: int = 0
    costs: list[Tensor] = field(default_factory=list)
    objectives: list[Tensor] = field(default_factory=list)
    ended: Status | None = None
    improved_at: int = 0
    last_best: Tensor | None = None
    measured: bool = False

    def snapshot(self) -> dict[str, Any]:
        """Return all of it as plain containers of tensors and numbers."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def copy(self, *, deep: bool) -> RestartState:
        """Return a state that can be changed without changing this one, in place too where it is deep."""
        same: Callable[[Any], Any] = _cloned if deep else _same
        return replace(
            self,
            values=same(self.values),
            optimizer=same(self.optimizer),
            costs=[*self.costs],
            objectives=[*self.objectives],
        )

    def kept(self, settings: SearchSettings) -> list[Tensor]:
        """Return what each restart gives back."""
        return self.best if settings.keep == "best" else self.values

    def leader(self) -> int:
        """Return which restart has the lowest finite cost."""
        return int(torch.where(torch.isfinite(self.best_cost), self.best_cost, torch.inf).argmin())


@dataclass(kw_only=True)
class Search:
    """A search under way: the restarts that run and those that successive halving has stopped.

    Args:
        problem: what is minimised.
        settings: what the loop was told.
        states: restarts that run, one state for each chunk that runs together.
        pruned: restarts that were stopped.
        split: whether a chunk was halved because it did not fit in memory.
    """

    problem: Problem
    settings: SearchSettings
    states: list[RestartState]
    pruned: list[RestartState] = field(default_factory=list)
    split: bool = False

    def all(self) -> list[RestartState]:
        """Return every restart's state."""
        return [*self.states, *self.pruned]


def init(problem: Problem, settings: SearchSettings, starts: list[Tensor], rows: list[int]) -> RestartState:
    """Return the state before the first step of some restarts.

    Where these are all restarts, the starting points themselves are updated in place.
    """
    values = starts if rows == list(range(len(starts[0]))) else [start[rows] for start in starts]
    cost = torch.full((len(rows),), torch.inf, dtype=problem.like.dtype, device=problem.like.device)
    return RestartState(
        rows=rows,
        values=values,
        best=[v.clone() for v in values],
        best_cost=cost,
        best_objective=cost.clone(),
        optimizer=settings.optimizer.init(values),
    )


def step(problem: Problem, settings: SearchSettings, measure: Measure, state: RestartState) -> None:
    """Move all restarts one step, in place."""
    recorded = state.step % settings.record_every != 0

    def evaluate(values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        nonlocal recorded
        cost, gradients = _evaluate(settings, measure, state, values, record=not recorded, slopes=True)
        recorded = True
        return cost, gradients

    factor = settings.step_factor(state.step)
    settings.optimizer.step(state.values, problem.variables, state.optimizer, evaluate, factor)
    state.step += 1
    if settings.median_every is not None and state.step % settings.median_every == 0:
        images = state.values[0]
        images.copy_(median_filter(images.flatten(0, 1)).unflatten(0, images.shape[:2]))


def measure_end(settings: SearchSettings, measure: Measure, state: RestartState) -> None:
    """Measure where the last step led."""
    _evaluate(settings, measure, state, state.values, record=True, slopes=False)
    state.measured = True


def _evaluate(
    settings: SearchSettings,
    measure: Measure,
    state: RestartState,
    values: list[Tensor],
    *,
    record: bool,
    slopes: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return cost and gradient of every restart, and keep the best values that were measured."""
    sharpness, factor = settings.sharpness(state.step), settings.prior_factor(state.step)
    cost, objective, gradients = measure(values, state.rows, sharpness, factor, slopes=slopes)
    better = cost < state.best_cost if settings.comparable else torch.isfinite(cost)
    state.best_cost = torch.where(better, cost, state.best_cost)
    state.best_objective = torch.where(better, objective, state.best_objective)
    state.best = [
        torch.where(better.view(-1, *[1] * (value.ndim - 1)), value, best)
        for best, value in zip(state.best, values, strict=True)
    ]
    state.evaluations += 1
    if record:
        state.costs.append(cost)
        state.objectives.append(objective)
    return cost, gradients


def within_tolerance(settings: SearchSettings, state: RestartState) -> bool:
    """Say whether a restart reached the objective at which the search may end; this waits for the device."""
    return settings.tolerance is not None and bool((state.best_objective <= settings.tolerance).any())


def terminate(settings: SearchSettings, state: RestartState) -> Status | None:
    """Return why these restarts are done before their last step, or None; this waits for the device."""
    if within_tolerance(settings, state):
        return "converged"
    if settings.patience is None:
        return None
    if state.last_best is None or bool((state.best_cost < state.last_best).any()):
        state.last_best, state.improved_at = state.best_cost, state.step
    return "converged" if state.step - state.improved_at >= settings.patience else None


def _same(tree: Any) -> Any:
    return tree


def _cloned(tree: Any) -> Any:
    """Return containers in which no tensor is one of those that were given."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {name: _cloned(part) for name, part in tree.items()}
    return [_cloned(part) for part in tree] if isinstance(tree, list) else tree


def select(settings: SearchSettings, state: RestartState, places: list[int]) -> RestartState:
    """Return the state of some of the restarts, given by their places in it."""
    index = torch.tensor(places, device=state.best_cost.device)

    def of(tensors: list[Tensor]) -> list[Tensor]:
        return [tensor[index] for tensor in tensors]

    return replace(
        state,
        rows=[state.rows[k] for k in places],
        values=of(state.values),
        best=of(state.best),
        best_cost=state.best_cost[index],
        best_objective=state.best_objective[index],
        optimizer=optimizers.select(settings.optimizer, state.optimizer, index),
        costs=of(state.costs),
        objectives=of(state.objectives),
        last_best=None if state.last_best is None else state.last_best[index],
    )
