"""The race of all restarts: who goes on at every rung, who falls behind, and what does not fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from invlib._group import Group
from invlib.reconstruction import Callback, Progress, Status

if TYPE_CHECKING:
    from invlib.matching import GradientMatching

CHECK_EVERY = 25  # steps between looks at the device, for early stopping and the progress bar


def rungs(steps: int, restarts: int, prune: bool) -> list[tuple[int, int]]:
    """Return up to which step how many restarts run: without pruning all of them to the end.

    With it, the worse half goes at every tenth of the run, until one is left for the rest.
    """
    found, left, tenth = [], restarts, 1
    while prune and left > 1 and tenth < 10:
        found.append((max(1, round(steps * tenth / 10)), left))
        left, tenth = math.ceil(left / 2), tenth + 1
    return [*found, (steps, left)]


class Race:
    """All groups of restarts, the ones still running and those that fell behind."""

    def __init__(self, attack: GradientMatching, groups: list[Group]) -> None:
        self.attack, self.groups, self.fallen = attack, groups, list[Group]()

    def all(self) -> list[Group]:
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

    def run(self, callback: Callback | None, bar: tqdm, save: Callable[[], None]) -> Status:
        for rung, left in rungs(self.attack.steps, self.attack.restarts, self.attack.prune):
            self.prune(left)
            place = 0
            while place < len(self.groups):
                group = self.groups[place]
                try:
                    ended = _run_group(group, rung, callback, bar, save, first=place == 0)
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
        first, groups = 0, list[Group]()
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


def _halves(group: Group, error: torch.OutOfMemoryError) -> list[Group]:
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
    group: Group, rung: int, callback: Callback | None, bar: tqdm, save: Callable[[], None], *, first: bool
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
        save()
        if callback is not None and callback(_progress(group, first)):
            return "interrupted"
    return group.ended or "max_steps"


def _progress(group: Group, first: bool) -> Progress:
    return Progress(
        step=group.step,
        steps=group.attack.steps,
        restarts=tuple(group.rows),
        first=first,
        images=lambda: group.leader().clone(),
        cost=lambda: float(group.best_cost.min()),
    )
