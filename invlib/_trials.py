"""The loop of gradient matching: make the groups of restarts, let them race, and say where each ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm.auto import tqdm

from invlib import _engines
from invlib._checkpoint import Checkpoint
from invlib._engines import memory
from invlib._group import Group
from invlib._problem import Problem
from invlib._race import Ends, Race
from invlib.reconstruction import Callback, History, Status

if TYPE_CHECKING:
    from invlib.matching import GradientMatching


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Where every restart of an observation ended, which of them ran at all, and what ran them."""

    values: list[Tensor]
    ran: Tensor
    status: Status
    history: History
    evaluations: int
    engine: str


def run_trials(
    attack: GradientMatching,
    problem: Problem,
    starts: list[Tensor],
    *,
    callback: Callback | None,
    progress: bool,
    checkpoint: Path | None,
    identity: dict[str, Any] | None = None,
) -> Trials:
    """Run all restarts, group by group, and return where each ended."""
    [trials] = run_races(
        attack,
        problem,
        starts,
        callback=callback,
        progress=progress,
        checkpoint=checkpoint,
        identity=identity,
    )
    return trials


def run_races(
    attack: GradientMatching,
    problem: Problem,
    starts: list[Tensor],
    *,
    callback: Callback | None = None,
    progress: bool,
    checkpoint: Path | None = None,
    identity: dict[str, Any] | None = None,
) -> list[Trials]:
    """Run the restarts of all observations, and return for each observation where its own ended."""
    together = attack.optimizer.together
    size = 1 if not together else (attack.chunk or len(starts[0]))
    engine, why = _engines.choose(
        attack.engine,
        problem,
        restarts=size,
        together=together,
        sharpening=attack.smoothing is not None,
        fading=attack.fading != 1,
    )
    measure = _engines.measure(engine, problem)
    chunks, split = _chunks(attack, problem, starts, engine)
    why += split
    groups = [Group(attack, problem, measure, list(chunk), starts) for chunk in chunks]
    race = Race(attack, starts, groups)
    keeper = Checkpoint(checkpoint, identity or {}, race)
    keeper.load()
    total = sum((rung - before) * left for before, rung, left in race.plan())
    with tqdm(
        total=total, initial=race.done(), disable=not progress, desc="gradient matching", unit="step"
    ) as bar:
        try:
            ended = race.run(callback, bar, keeper.save_now_and_then)
        except KeyboardInterrupt:
            ended = False
    if ended:
        keeper.remove()
    else:
        keeper.save()
    if race.halved:
        why += ", halved where they did not fit in memory"
    fallback = getattr(measure, "fallback", "")
    engine_words = f"eager steps, for they cannot be captured: {fallback}" if fallback else f"{engine}: {why}"
    ends = race.ends()
    found = []
    for k in range(len(starts[0]) // attack.restarts):
        its = slice(k * attack.restarts, (k + 1) * attack.restarts)
        found.append(
            Trials(
                values=[value[its] for value in ends.values],
                ran=ends.steps[its] > 0,
                status=race.status(k) if ended else "interrupted",
                history=_history(attack, ends, its),
                evaluations=int(ends.evaluations[its].sum()),
                engine=engine_words,
            )
        )
    return found


def _chunks(
    attack: GradientMatching, problem: Problem, starts: list[Tensor], engine: _engines.Engine
) -> tuple[list[range], str]:
    """Return which restarts run together, and what to say of it where memory alone says so."""
    count = len(starts[0])
    size = 1 if not attack.optimizer.together else (attack.chunk or count)
    unit = attack.restarts
    if engine == "eager" or size == 1 or attack.chunk is not None:
        # A chunk holds some observations, or a part of one.
        size, block = (size - size % unit, count) if size > unit else (size, unit)
        return [
            range(a, min(a + size, first + block))
            for first in range(0, count, block)
            for a in range(first, first + block, size)
        ], ""
    sharpness = None if attack.smoothing is None else attack.smoothing.sharpness(0, attack.steps)
    most, need = memory.largest(problem, starts, sharpness)
    chunks = memory.split(count, most, unit=unit)
    if len(chunks) == 1:
        return chunks, ""
    size = max(len(rows) for rows in chunks)
    return chunks, f", in chunks of {size}, for each restart needs about {memory.words(need)}"


def _history(attack: GradientMatching, ends: Ends, rows: slice) -> History:
    """Return what was recorded of some restarts, one row for each recorded step."""
    count = int(ends.recorded[rows].max())
    if count == 0:
        return History()
    steps = [k * attack.record_every for k in range(count)]
    if int(ends.steps[rows].max()) == attack.steps:
        steps[-1] = attack.steps
    return History(
        steps=steps,
        cost=ends.costs[rows, :count].T.contiguous(),
        objective=ends.objectives[rows, :count].T.contiguous(),
    )
