"""What looks on while a search runs: the progress bar and the caller's callback."""

from __future__ import annotations

from tqdm.auto import tqdm

from invlib.core.reconstruction import Callback, Progress
from invlib.search.halving import rungs
from invlib.search.state import RestartState, Search

CHECK_EVERY = 25  # steps between looks at the device


class Hook:
    """Told of a search's beginning, its steps and its end; does nothing of its own."""

    def begin(self, search: Search) -> None:
        """Before the first step; the search may be changed."""

    def start(self, search: Search, state: RestartState) -> None:
        """Before the first step of some restarts."""

    def step(self, search: Search, state: RestartState) -> bool:
        """After a step of some restarts; returning True stops the search."""
        return False

    def end(self, search: Search, *, finished: bool) -> None:
        """After the last step, or after the search was stopped or interrupted."""

    def close(self) -> None:
        """In any case, also after an error."""


class Bar(Hook):
    """A progress bar of all steps of all chunks.

    Args:
        show: whether it is shown.
    """

    def __init__(self, *, show: bool) -> None:
        self.show, self.bar = show, tqdm(disable=True)

    def begin(self, search: Search) -> None:
        """Draw it, at where the search goes on."""
        self.bar = tqdm(
            total=_planned_steps(search),
            initial=sum(state.step for state in search.all()),
            disable=not self.show,
            desc="gradient matching",
            unit="step",
        )

    def step(self, search: Search, state: RestartState) -> bool:
        """Move it on, and show the lowest cost now and then, for which it waits for the device."""
        self.bar.update(1)
        if self.show and state.step % CHECK_EVERY == 0:
            self.bar.set_postfix(cost=f"{state.best_cost.min().item():.4g}", refresh=False)
        return False

    def close(self) -> None:
        """Leave it as it is."""
        self.bar.close()


class Shared(Hook):
    """Moves a progress bar that several searches share by the evaluations of one of them.

    Args:
        bar: the bar, which is not closed.
    """

    def __init__(self, bar: tqdm) -> None:
        self.bar, self.seen = bar, 0

    def begin(self, search: Search) -> None:
        """Move it to where the search goes on."""
        self._move(search)

    def step(self, search: Search, state: RestartState) -> bool:
        """Move it on."""
        self._move(search)
        return False

    def _move(self, search: Search) -> None:
        now = sum(state.evaluations * len(state.rows) for state in search.all())
        self.bar.update(now - self.seen)
        self.seen = now


class Told(Hook):
    """Hands `invlib.Progress` to a callback after every step.

    Args:
        callback: returns True to stop the search.
    """

    def __init__(self, callback: Callback) -> None:
        self.callback = callback

    def start(self, search: Search, state: RestartState) -> None:
        """Show the starting points."""
        self.callback(_progress(search, state))

    def step(self, search: Search, state: RestartState) -> bool:
        """Show where the restarts are, and ask whether to stop."""
        return bool(self.callback(_progress(search, state)))


def _progress(search: Search, state: RestartState) -> Progress:
    problem = search.problem
    return Progress(
        step=state.step,
        steps=search.settings.steps,
        restarts=tuple(state.rows),
        first=state is search.states[0],
        images=lambda: problem.decode(problem.inputs(state.best[0][state.leader()])).clamp(0, 1),
        cost=lambda: float(state.best_cost.min()),
    )


def _planned_steps(search: Search) -> int:
    """Return how many steps all chunks take together, at most."""
    settings, total, before = search.settings, 0, 0
    observations = len({row // settings.restarts for state in search.all() for row in state.rows})
    for rung, left in rungs(settings.steps, settings.restarts, settings.prune):
        total += (rung - before) * min(left * observations, len(search.states))
        before = rung
    return total
