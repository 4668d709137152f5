"""The loop of a search: make chunks of restarts, run them from rung to rung, and say where each ended."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from invlib.core.reconstruction import History, Status
from invlib.errors import InvlibError
from invlib.optim.optimizers import evaluates_first
from invlib.search import engines
from invlib.search.engines import batched, selection
from invlib.search.engines.selection import Engine
from invlib.search.halving import rungs, survivors
from invlib.search.hooks import CHECK_EVERY, Hook
from invlib.search.interrupt import held
from invlib.search.problem import Measure, Problem
from invlib.search.settings import SearchSettings
from invlib.search.state import (
    RestartState,
    Search,
    init,
    measure_end,
    select,
    step,
    terminate,
    within_tolerance,
)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Where the restarts of an observation ended.

    Args:
        values: ``(R, ...)``, what each restart gives back.
        ran: bool ``(R,)``, whether it took a step at all.
        status: why the search stopped.
        history: what was recorded.
        evaluations: of all restarts together.
        engine: what ran the steps.
        engine_reason: why that was chosen.
        chunks: how many restarts ran together, chunk by chunk, over all observations.
    """

    values: list[Tensor]
    ran: Tensor
    status: Status
    history: History
    evaluations: int
    engine: str
    engine_reason: str
    chunks: tuple[int, ...]


def run(
    problem: Problem,
    starts: list[Tensor],
    settings: SearchSettings,
    hooks: Sequence[Hook] = (),
    *,
    engine: Engine | None = None,
) -> list[SearchResult]:
    """Run all restarts, and return a result for each observation. Ctrl-C ends the run as a hook may.

    Args:
        problem: what is minimised, for one observation or several.
        starts: the starting points of each variable, ``(observations * restarts, ...)``.
        settings: what the loop is told.
        hooks: told of every step, in this order.
        engine: what runs the steps; None chooses by the settings.
    """
    engine = engine or selection.choose(problem, settings, len(starts[0]))
    chunks, memory = _chunks(problem, settings, starts, engine)
    states = [init(problem, settings, starts, list(rows)) for rows in chunks]
    search = Search(problem=problem, settings=settings, states=states)
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.close)
            hook.begin(search)
        try:
            finished = _climb(search, engine.measure, hooks)
        except KeyboardInterrupt:
            finished = False
        for hook in hooks:
            hook.end(search, finished=finished)
    why = engine.reason + memory + (", halved where they did not fit in memory" if search.split else "")
    return [
        _result(search, starts, k, finished, engine.name, why, tuple(len(rows) for rows in chunks))
        for k in range(len(starts[0]) // settings.restarts)
    ]


def _climb(search: Search, measure: Measure, hooks: Sequence[Hook]) -> bool:
    """Run to the last rung, and say whether it was reached: a hook may stop the search before."""
    settings = search.settings
    for rung, left in rungs(settings.steps, settings.restarts, settings.prune):
        _prune(search, left)
        place = 0
        while place < len(search.states):
            fits = True
            try:
                if not _go_on(search, search.states[place], rung, measure, hooks):
                    return False
            except torch.OutOfMemoryError:
                if len(search.states[place].rows) == 1:
                    raise
                fits = False
            if fits:
                place += 1
            else:
                # Only here: the error held the frames of the step that failed, and with them its memory.
                search.states[place : place + 1] = _halves(search, search.states[place])
                search.split = True
    return True


def _go_on(search: Search, state: RestartState, rung: int, measure: Measure, hooks: Sequence[Hook]) -> bool:
    """Run a chunk up to a rung, and say whether the search goes on."""
    settings = search.settings
    if any(within_tolerance(settings, other) for other in search.states):
        state.ended = "converged"
    while state.ended is None and (
        state.step < rung or (state.step == settings.steps and not state.measured)
    ):
        if state.step == 0:
            for hook in hooks:
                hook.start(search, state)
        with held():  # Ctrl-C waits for the end of the step; a second one undoes it
            if state.step < settings.steps:
                _advance(search.problem, settings, measure, state)
            if state.step == settings.steps:
                _finish(settings, measure, state)
        stops = [hook.step(search, state) for hook in hooks]
        if any(stops):
            return False
    return True


def _advance(problem: Problem, settings: SearchSettings, measure: Measure, state: RestartState) -> None:
    """Take restarts one step, or leave them as they were where an error comes between."""
    after = state.copy(deep=not evaluates_first(settings.optimizer))
    step(problem, settings, measure, after)
    if after.optimizer.get("ended"):
        after.ended = "non_finite"
    _take(settings, state, after, check=after.step < settings.steps)


def _finish(settings: SearchSettings, measure: Measure, state: RestartState) -> None:
    """Measure where the last step led, likewise."""
    after = state.copy(deep=False)
    measure_end(settings, measure, after)
    _take(settings, state, after, check=True)


def _take(settings: SearchSettings, state: RestartState, after: RestartState, *, check: bool) -> None:
    if check and after.ended is None and after.step % CHECK_EVERY == 0:
        after.ended = terminate(settings, after)
    vars(state).update(vars(after))  # in one call, which no signal can cut in two


def _prune(search: Search, left: int) -> None:
    """Stop all but so many restarts of each observation, by the lowest cost that each has reached."""
    total = sum(len(state.rows) for state in search.all())
    costs, running = torch.zeros(total, dtype=torch.float64), torch.zeros(total, dtype=torch.bool)
    for state in search.states:
        costs[state.rows], running[state.rows] = state.best_cost.to(costs), True
    chosen = survivors(costs, running, left, search.settings.restarts).tolist()
    states, pruned = list[RestartState](), [*search.pruned]
    for state in search.states:
        staying = [k for k, row in enumerate(state.rows) if chosen[row]]
        going = [k for k, row in enumerate(state.rows) if not chosen[row]]
        if staying and going:
            pruned.append(select(search.settings, state, going))
            states.append(select(search.settings, state, staying))
        else:
            (states if staying else pruned).append(state)
    vars(search).update(states=states, pruned=pruned)  # in one call, as for a step


def _halves(search: Search, state: RestartState) -> list[RestartState]:
    """Split a chunk that does not fit in memory; each half goes on where the whole one stood."""
    if search.problem.like.is_cuda:
        torch.cuda.empty_cache()
    count = len(state.rows)
    parts = (range(count // 2), range(count // 2, count))
    return [select(search.settings, state, list(part)) for part in parts]


def _chunks(
    problem: Problem, settings: SearchSettings, starts: list[Tensor], engine: Engine
) -> tuple[list[range], str]:
    """Return which restarts run together, and a clause on it where free memory decided that."""
    count, unit = len(starts[0]), settings.restarts
    size = 1 if not settings.optimizer.together else (settings.chunk or count)
    if engine.name != "eager" and size > 1 and settings.chunk is None:
        try:
            most, need = engines.memory.largest(
                problem, starts, batched.part_of_many(problem), settings.sharpness(0)
            )
        except InvlibError:
            raise
        except Exception as error:  # the network cannot be mapped
            if engine.guard is None:
                raise
            engine.guard.refuse(error)
        else:
            chunks = engines.memory.split(count, most, unit=unit)
            if len(chunks) == 1:
                return chunks, ""
            return chunks, f", in chunks, because each restart needs about {engines.memory.words(need)}"
    # A chunk holds some observations, or a part of one.
    size, block = (size - size % unit, count) if size > unit else (size, unit)
    return [
        range(a, min(a + size, first + block))
        for first in range(0, count, block)
        for a in range(first, first + block, size)
    ], ""


def _result(
    search: Search,
    starts: list[Tensor],
    observation: int,
    finished: bool,
    engine: str,
    reason: str,
    chunks: tuple[int, ...],
) -> SearchResult:
    """Put together what the restarts of an observation have, wherever they ran."""
    settings = search.settings
    first, count = observation * settings.restarts, settings.restarts
    states = [s for s in search.all() if any(first <= row < first + count for row in s.rows)]
    values = [start.new_zeros(count, *start.shape[1:]) for start in starts]
    recorded = max(len(state.costs) for state in states)
    table = starts[0].new_full((2, recorded, count), torch.nan, device="cpu")
    ran, evaluations = torch.zeros(count, dtype=torch.bool), 0
    for state in states:
        places = [k for k, row in enumerate(state.rows) if first <= row < first + count]
        rows = [state.rows[k] - first for k in places]
        for value, kept in zip(values, state.kept(settings), strict=True):
            value[rows] = kept[places]
        if state.costs:
            for part, columns in zip(table, (state.costs, state.objectives), strict=True):
                part[: len(columns), rows] = torch.stack(columns).to(part)[:, places]
        ran[rows] = state.step > 0
        evaluations += state.evaluations * len(rows)
    steps = [k * settings.record_every for k in range(recorded)]
    if recorded and max(state.step for state in states) == settings.steps:
        steps[-1] = settings.steps
    running = [state for state in search.states if any(state is other for other in states)]
    ended: Status = "converged" if any(state.ended == "converged" for state in running) else "max_steps"
    history = History(steps=steps, cost=table[0], objective=table[1]) if recorded else History()
    return SearchResult(
        values=values,
        ran=ran,
        status=ended if finished else "interrupted",
        history=history,
        evaluations=evaluations,
        engine=engine,
        engine_reason=reason,
        chunks=chunks,
    )
