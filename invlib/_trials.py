"""The loop of gradient matching: restarts together, best so far kept on the device, checkpoints."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from invlib import _engines
from invlib._problem import Problem
from invlib.errors import ConfigError
from invlib.priors import median_filter
from invlib.reconstruction import Callback, History, Progress, Status

if TYPE_CHECKING:
    from invlib.matching import GradientMatching

CHECK_EVERY = 25  # steps between looks at the device, for early stopping and the progress bar
CHECKPOINT_SECONDS = 30.0


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


_SAVED = (
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


class _Group:
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
        self.values = [start[rows].clone() for start in starts]
        self.best = [v.clone() for v in self.values]
        self.best_cost = torch.full(
            (len(rows),), torch.inf, dtype=problem.like.dtype, device=problem.like.device
        )
        self.best_objective = self.best_cost.clone()
        self.state: dict[str, Any] = attack.optimizer.init(self.values)
        self.step = 0
        self.ended: Status | None = None
        self.improved_at = 0
        self.last_best: Tensor | None = None
        self.evaluations = 0
        self.costs: list[Tensor] = []
        self.objectives: list[Tensor] = []
        self.latest: tuple[Tensor, Tensor] | None = None

    def snapshot(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SAVED}

    def restore(self, saved: dict[str, Any]) -> None:
        for name in _SAVED:
            setattr(self, name, saved[name])

    def part(self, places: list[int]) -> _Group:
        """Return a group of some of these restarts, which stands where this one does."""
        count, index = len(self.rows), torch.tensor(places, device=self.problem.like.device)

        def take(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.index_select(0, index.to(value.device)) if value.shape[:1] == (count,) else value
            if isinstance(value, list):
                return [take(v) for v in value]
            return {k: take(v) for k, v in value.items()} if isinstance(value, dict) else value

        group = copy.copy(self)
        for name in _SAVED:
            setattr(group, name, take(getattr(self, name)))
        group.rows = [self.rows[k] for k in places]
        # What was recorded is of all restarts of the attack, not of this group.
        group.costs, group.objectives = list(self.costs), list(self.objectives)
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
        self.evaluations += len(self.rows)
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
        """Record the latest cost of all restarts; those that are not of this group have none."""
        assert self.latest is not None
        for column, values in zip((self.costs, self.objectives), self.latest, strict=True):
            row = values.new_full((self.attack.restarts,), torch.nan)
            row[self.rows] = values
            column.append(row)

    def finish(self) -> None:
        """Measure where the last step led, so that it too can be the best."""
        self.evaluate(self.values)
        self.record()

    def stopped(self) -> bool:
        """Say whether early stopping applies; this waits for the device."""
        if self.tolerable():
            return True
        patience = self.attack.patience
        if patience is None:
            return False
        if self.last_best is None or bool((self.best_cost < self.last_best).any()):
            self.improved_at, self.last_best = self.step, self.best_cost.clone()
        return self.step - self.improved_at >= patience

    def tolerable(self) -> bool:
        """Say whether a restart is as good as was asked for, so that no other has to run."""
        tolerance = self.attack.tolerance
        return tolerance is not None and bool((self.best_objective <= tolerance).any())

    def leader(self) -> Tensor:
        """Return the best images so far of the restart that leads, in [0, 1]."""
        leader = torch.where(torch.isfinite(self.best_cost), self.best_cost, torch.inf).argmin()
        return self.problem.decode(self.problem.inputs(self.best[0][leader])).clamp(0, 1)

    def kept(self) -> list[Tensor]:
        return self.best if self.attack.keep == "best" else self.values


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
    everyone = list(range(attack.restarts))
    groups = [
        _Group(attack, problem, measure, everyone[a : a + size], starts)
        for a in range(0, attack.restarts, size)
    ]
    fingerprint = f"{problem.fingerprint}\nstarts {[float(s.double().norm()) for s in starts]}"
    race = _Race(attack, groups)
    keeper = _Checkpoint(checkpoint, fingerprint, race)
    keeper.load()
    total = sum((rung - before) * left for before, rung, left in race.plan())
    with tqdm(
        total=total, initial=race.done(), disable=not progress, desc="gradient matching", unit="step"
    ) as bar:
        try:
            status = race.run(callback, bar, keeper)
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


def rungs(steps: int, restarts: int, prune: bool) -> list[tuple[int, int]]:
    """Return up to which step how many restarts run: without pruning all of them to the end.

    With it, the worse half goes at every tenth of the run, until one is left for the rest.
    """
    found, left, tenth = [], restarts, 1
    while prune and left > 1 and tenth < 10:
        found.append((max(1, round(steps * tenth / 10)), left))
        left, tenth = math.ceil(left / 2), tenth + 1
    return [*found, (steps, left)]


class _Race:
    """All groups of restarts, the ones still running and those that fell behind."""

    def __init__(self, attack: GradientMatching, groups: list[_Group]) -> None:
        self.attack, self.groups, self.fallen = attack, groups, list[_Group]()

    def all(self) -> list[_Group]:
        return [*self.groups, *self.fallen]

    def plan(self) -> list[tuple[int, int, int]]:
        """Return from which step to which how many groups run, at most."""
        found, before = [], 0
        for rung, left in rungs(self.attack.steps, self.attack.restarts, self.attack.prune):
            found.append((before, rung, min(left, len(self.groups))))
            before = rung
        return found

    def done(self) -> int:
        return sum(group.step for group in self.all())

    def run(self, callback: Callback | None, bar: tqdm, keeper: _Checkpoint) -> Status:
        for rung, left in rungs(self.attack.steps, self.attack.restarts, self.attack.prune):
            self.prune(left)
            place = 0
            while place < len(self.groups):
                group = self.groups[place]
                try:
                    ended = _run_group(group, rung, callback, bar, keeper, first=place == 0)
                except torch.OutOfMemoryError as error:
                    self.groups[place : place + 1] = _halves(group, error)
                    continue
                place += 1
                if ended == "interrupted":
                    return ended
                if ended == "converged" and group.tolerable():
                    return ended
        return "converged" if any(group.ended == "converged" for group in self.groups) else "max_steps"

    def prune(self, left: int) -> None:
        """Let the best of the running restarts go on, by the lowest cost that each has reached."""
        if left >= sum(len(group.rows) for group in self.groups):
            return
        cost = torch.cat([group.best_cost for group in self.groups])
        order = torch.where(torch.isfinite(cost), cost, torch.inf).argsort(stable=True).tolist()
        chosen = set(order[:left])
        first, groups = 0, list[_Group]()
        for group in self.groups:
            places = range(len(group.rows))
            staying = [k for k in places if first + k in chosen]
            going = [k for k in places if first + k not in chosen]
            first += len(places)
            if not staying or not going:
                (groups if staying else self.fallen).append(group)
                continue
            # What was recorded and counted so far stays with those that go on.
            behind = group.part(going)
            behind.costs, behind.objectives, behind.evaluations = [], [], 0
            self.fallen.append(behind)
            groups.append(group.part(staying))
        self.groups = groups

    def kept(self) -> list[Tensor]:
        rows = torch.tensor([row for group in self.all() for row in group.rows]).argsort()
        parts = zip(*[group.kept() for group in self.all()], strict=True)
        return [torch.cat(part)[rows.to(part[0].device)] for part in parts]

    def ran(self) -> Tensor:
        ran = torch.zeros(self.attack.restarts, dtype=torch.bool)
        for group in self.all():
            ran[group.rows] = group.step > 0
        return ran

    def evaluations(self) -> int:
        return sum(group.evaluations for group in self.all())


def _halves(group: _Group, error: torch.OutOfMemoryError) -> list[_Group]:
    """Split a group that does not fit in memory; each half goes on where the whole one stood."""
    count = len(group.rows)
    if count == 1:
        raise error
    del error  # it holds the frames of the step that failed, and with them its memory
    if group.problem.like.is_cuda:
        torch.cuda.empty_cache()
    first, second = (group.part(list(part)) for part in (range(count // 2), range(count // 2, count)))
    second.costs, second.objectives, second.evaluations = [], [], 0
    return [first, second]


def _run_group(
    group: _Group, rung: int, callback: Callback | None, bar: tqdm, keeper: _Checkpoint, *, first: bool
) -> Status:
    steps = group.attack.steps
    for _ in range(group.step, rung):
        if group.ended is not None:
            break
        if callback is not None and group.step == 0:
            callback(_progress(group, first))
        group.advance()
        bar.update(1)
        if group.step == steps:
            group.finish()
        if group.step % CHECK_EVERY == 0:
            if not bar.disable:
                bar.set_postfix(cost=f"{group.best_cost.min().item():.4g}", refresh=False)
            if group.stopped():
                group.ended = "converged"
        keeper.save_now_and_then()
        if callback is not None and callback(_progress(group, first)):
            return "interrupted"
    return group.ended or "max_steps"


def _progress(group: _Group, first: bool) -> Progress:
    return Progress(
        step=group.step,
        steps=group.attack.steps,
        restarts=tuple(group.rows),
        first=first,
        images=lambda: group.leader().clone(),
        cost=lambda: float(group.best_cost.min()),
    )


def _history(attack: GradientMatching, groups: list[_Group]) -> History:
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


class _Checkpoint:
    """The state of all groups in one file, written beside and renamed."""

    def __init__(self, path: Path | None, fingerprint: str, race: _Race) -> None:
        self.path, self.fingerprint, self.race = path, fingerprint, race
        self.saved_at = time.monotonic()

    def load(self) -> None:
        if self.path is None or not self.path.exists():
            return
        try:
            saved = torch.load(
                self.path, map_location=self.race.groups[0].problem.like.device, weights_only=True
            )
        except Exception as error:
            raise ConfigError(
                f"checkpoint {self.path} cannot be read ({error}); remove it to start anew"
            ) from error
        if saved.get("fingerprint") != self.fingerprint:
            raise ConfigError(
                f"checkpoint {self.path} is of another run (other settings or another observation); "
                "remove it or name another file"
            )
        some = self.race.groups[0]
        for name in ("groups", "fallen"):
            restored = [copy.copy(some) for _ in saved[name]]
            for group, state in zip(restored, saved[name], strict=True):
                group.restore(state)
            setattr(self.race, name, restored)

    def save(self) -> None:
        if self.path is None:
            return
        beside = self.path.with_name(self.path.name + ".part")
        state = {
            "fingerprint": self.fingerprint,
            "groups": [g.snapshot() for g in self.race.groups],
            "fallen": [g.snapshot() for g in self.race.fallen],
        }
        torch.save(state, beside)
        os.replace(beside, self.path)
        self.saved_at = time.monotonic()

    def save_now_and_then(self) -> None:
        if self.path is not None and time.monotonic() - self.saved_at >= CHECKPOINT_SECONDS:
            self.save()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
