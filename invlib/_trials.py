"""The loop of gradient matching: make the groups of restarts, let them race, and say where each ended."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from invlib import _engines
from invlib._checkpoint import Checkpoint
from invlib._engines import memory
from invlib._group import Group
from invlib._problem import Problem
from invlib._race import Race
from invlib.reconstruction import Callback, History, Status

if TYPE_CHECKING:
    from invlib.matching import GradientMatching


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Where every restart ended, which of them ran at all, and what ran them."""

    values: list[Tensor]
    ran: Tensor
    status: Status
    history: History
    evaluations: int
    engine: str

    def part(self, rows: slice) -> Trials:
        """Return some of the restarts, with their share of the evaluations."""
        history = self.history
        return replace(
            self,
            values=[value[rows] for value in self.values],
            ran=self.ran[rows],
            history=replace(history, cost=history.cost[:, rows], objective=history.objective[:, rows]),
            evaluations=self.evaluations * len(self.ran[rows]) // len(self.ran),
        )


def run_trials(
    attack: GradientMatching,
    problem: Problem,
    starts: list[Tensor],
    *,
    callback: Callback | None,
    progress: bool,
    checkpoint: Path | None,
) -> Trials:
    """Run all restarts, group by group, and return where each ended."""
    together = attack.optimizer.together
    size = 1 if not together else (attack.chunk or attack.restarts)
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
    groups = [Group(attack, problem, measure, list(rows), starts) for rows in chunks]
    fingerprint = f"{problem.fingerprint}\nstarts {[float(s.double().norm()) for s in starts]}"
    race = Race(attack, groups)
    keeper = Checkpoint(checkpoint, fingerprint, race)
    keeper.load()
    total = sum((rung - before) * left for before, rung, left in race.plan())
    with tqdm(
        total=total, initial=race.done(), disable=not progress, desc="gradient matching", unit="step"
    ) as bar:
        try:
            status = race.run(callback, bar, keeper.save_now_and_then)
        except KeyboardInterrupt:
            status = "interrupted"
    if status == "interrupted":
        keeper.save()
    else:
        keeper.remove()
    fallback = getattr(measure, "fallback", "")
    return Trials(
        values=race.kept(),
        ran=race.ran(),
        status=status,
        history=_history(attack, race.all()),
        evaluations=race.evaluations(),
        engine=f"eager steps, for they cannot be captured: {fallback}" if fallback else f"{engine}: {why}",
    )


def _chunks(
    attack: GradientMatching, problem: Problem, starts: list[Tensor], engine: _engines.Engine
) -> tuple[list[range], str]:
    """Return which restarts run together, and what to say of it where memory alone says so."""
    count = len(starts[0])
    size = 1 if not attack.optimizer.together else (attack.chunk or count)
    if engine == "eager" or size == 1 or attack.chunk is not None:
        return [range(a, min(a + size, count)) for a in range(0, count, size)], ""
    sharpness = None if attack.smoothing is None else attack.smoothing.sharpness(0, attack.steps)
    most, need = memory.largest(problem, starts, sharpness)
    chunks = memory.split(count, most, unit=problem.guesses)
    if len(chunks) == 1:
        return chunks, ""
    size = max(len(rows) for rows in chunks)
    return chunks, f", in chunks of {size}, for each restart needs about {memory.words(need)}"


def _history(attack: GradientMatching, groups: list[Group]) -> History:
    """Line up what the groups recorded; a restart that fell behind or stopped early is padded by NaN."""
    rows = max(len(g.costs) for g in groups)
    if rows == 0:
        return History()
    longest = max(groups, key=lambda g: len(g.costs))
    steps = [k * attack.record_every for k in range(rows)]
    if longest.step == attack.steps:
        steps[-1] = attack.steps

    def table(columns: list[list[Tensor]]) -> Tensor:
        found = torch.full((rows, attack.restarts), torch.nan, dtype=groups[0].problem.like.dtype)
        for column in columns:
            for k, recorded in enumerate(column):
                found[k] = torch.where(torch.isnan(found[k]), recorded.cpu(), found[k])
        return found

    return History(
        steps=steps,
        cost=table([g.costs for g in groups]),
        objective=table([g.objectives for g in groups]),
    )
