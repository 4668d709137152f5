"""The race of all restarts: who goes on at every rung, who falls behind, and what does not fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Where every restart ended.

    Args:
        values: ``(restarts, ...)``, what each found.
        steps: how many steps it took.
        evaluations: how often it was evaluated.
        recorded: how often its cost was recorded.
        costs: ``(restarts, records)``, padded by NaN.
        objectives: as the costs.
    """

    values: list[Tensor]
    steps: Tensor
    evaluations: Tensor
    recorded: Tensor
    costs: Tensor
    objectives: Tensor


class Race:
    """All groups of restarts, the ones still running and those that fell behind.

    Each observation has a race of its own: its restarts are compared with each other alone.
    """

    def __init__(self, attack: GradientMatching, starts: list[Tensor], groups: list[Group]) -> None:
        self.attack, self.starts, self.groups, self.fallen = attack, starts, groups, list[Group]()
        self.total, self.halved = len(starts[0]), False

    def all(self) -> list[Group]:
        return [*self.groups, *self.fallen]

    def plan(self) -> list[tuple[int, int, int]]:
        """Return from which step to which how many groups run, at most."""
        found, before = [], 0
        observations = len(set[int]().union(*[group.observations() for group in self.all()]))
        for rung, left in rungs(self.attack.steps, self.attack.restarts, self.attack.prune):
            found.append((before, rung, min(left * observations, len(self.groups))))
            before = rung
        return found

    def done(self) -> int:
        return sum(group.step for group in self.all())

    def run(self, callback: Callback | None, bar: tqdm, save: Callable[[], None]) -> bool:
        """Run to the end, and say whether that was reached: the callback may stop it before."""
        for rung, left in rungs(self.attack.steps, self.attack.restarts, self.attack.prune):
            self.prune(left)
            place = 0
            while place < len(self.groups):
                fits = True
                try:
                    if not self._go_on(place, rung, callback, bar, save):
                        return False
                except torch.OutOfMemoryError:
                    if len(self.groups[place].rows) == 1:
                        raise
                    fits = False
                if fits:
                    place += 1
                else:
                    # Only here: the error held the frames of the step that failed, and with them its memory.
                    self.groups[place : place + 1] = _halves(self.groups[place])
                    self.halved = True
        return True

    def _go_on(
        self, place: int, rung: int, callback: Callback | None, bar: tqdm, save: Callable[[], None]
    ) -> bool:
        group, first = self.groups[place], place == 0
        while group.step < rung and group.ended is None:
            if callback is not None and group.step == 0:
                callback(_progress(group, first))
            group.advance()
            bar.update(1)
            if group.step == self.attack.steps:
                group.finish()
            if group.step % CHECK_EVERY == 0:
                if not bar.disable:
                    bar.set_postfix(cost=f"{group.best_cost.min().item():.4g}", refresh=False)
                self._stop(place)
                group = self.groups[place]
            save()
            if callback is not None and callback(_progress(group, first)):
                return False
        return True

    def _stop(self, place: int) -> None:
        """Let those observations end with which early stopping is done."""
        group = self.groups[place]
        tolerable, weary = group.tolerable(), group.weary()
        self._end(place, tolerable | weary)
        if tolerable:
            for other in range(len(self.groups)):
                self._end(other, tolerable)

    def _end(self, place: int, observations: set[int]) -> None:
        group = self.groups[place]
        over = group.places(observations)
        if group.ended is not None or not over:
            return
        staying = [k for k in range(len(group.rows)) if k not in set(over)]
        if staying:
            # The end of the list: whoever walks along it does not lose his place.
            self.groups.append(group.part(over))
            self.groups[place] = group.part(staying)
            group = self.groups[-1]
        group.ended = "converged"

    def prune(self, left: int) -> None:
        """Let the best of each observation's restarts go on, by the lowest cost that each has reached."""
        if left >= self.attack.restarts:
            return
        reached, running = torch.zeros(2, self.total, dtype=torch.float64)
        for group in self.groups:
            cost = torch.where(torch.isfinite(group.best_cost), group.best_cost, torch.inf)
            reached[group.rows], running[group.rows] = cost.to(reached), 1.0
        ranked: dict[int, list[tuple[float, int]]] = {}
        for row in running.nonzero().flatten().tolist():
            ranked.setdefault(row // self.attack.restarts, []).append((float(reached[row]), row))
        chosen = {row for ranks in ranked.values() for _, row in sorted(ranks)[:left]}
        groups = list[Group]()
        for group in self.groups:
            staying = [k for k, row in enumerate(group.rows) if row in chosen]
            going = [k for k, row in enumerate(group.rows) if row not in chosen]
            if staying and going:
                self.fallen.append(group.part(going))
                groups.append(group.part(staying))
            else:
                (groups if staying else self.fallen).append(group)
        self.groups = groups

    def status(self, observation: int) -> Status:
        ended = [group.ended for group in self.groups if observation in group.observations()]
        return "converged" if "converged" in ended else "max_steps"

    def ends(self) -> Ends:
        """Return where the restarts stand."""

        def filled(shape: tuple[int, ...], of: Callable[[Group], Tensor], like: Tensor) -> Tensor:
            found = like.new_zeros(self.total, *shape)
            for group in self.all():
                found[group.rows] = of(group).to(found)
            return found

        def count(of: Callable[[Group], int]) -> Tensor:
            return filled((), lambda group: torch.tensor(of(group)), torch.zeros(0, dtype=torch.int64))

        def table(of: Callable[[Group], list[Tensor]]) -> Tensor:
            return filled((longest,), lambda group: _padded(of(group), longest), self.starts[0].new_zeros(0))

        recorded = count(lambda group: len(group.costs))
        longest = int(recorded.max())
        return Ends(
            values=[
                filled(tuple(start.shape[1:]), lambda group, k=k: group.kept()[k], start)  # type: ignore[misc]
                for k, start in enumerate(self.starts)
            ],
            steps=count(lambda group: group.step),
            evaluations=filled((), lambda group: group.evaluations, recorded),
            recorded=recorded,
            costs=table(lambda group: group.costs).cpu(),
            objectives=table(lambda group: group.objectives).cpu(),
        )


def _padded(columns: list[Tensor], longest: int) -> Tensor:
    """Return what was recorded, one row for each restart, padded by NaN."""
    if not columns:
        return torch.tensor(torch.nan)
    recorded = torch.stack(columns, 1)
    return torch.nn.functional.pad(recorded, (0, longest - recorded.shape[1]), value=torch.nan)


def _halves(group: Group) -> list[Group]:
    """Split a group that does not fit in memory; each half goes on where the whole one stood."""
    count = len(group.rows)
    if group.problem.like.is_cuda:
        torch.cuda.empty_cache()
    return [group.part(list(part)) for part in (range(count // 2), range(count // 2, count))]


def _progress(group: Group, first: bool) -> Progress:
    return Progress(
        step=group.step,
        steps=group.attack.steps,
        restarts=tuple(group.rows),
        first=first,
        images=lambda: group.leader().clone(),
        cost=lambda: float(group.best_cost.min()),
    )
