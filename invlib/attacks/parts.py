"""A search in several parts, which looks like one to a callback, a progress bar and a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from invlib.attacks.matching import GradientMatching
from invlib.core.observation import Observation
from invlib.core.reconstruction import Callback, Progress, Reconstruction
from invlib.search.checkpoint import Checkpoint
from invlib.search.hooks import Hook, Shared, Told

Within = tuple[Callable[[Tensor], Tensor], int]


class Parts:
    """Runs the parts of a search one after another; those that a checkpoint has are not run again.

    Args:
        model: the model that the client received.
        generator: draws starting points.
        callback: told of all parts as of one.
        bar: counts evaluations.
        saved: where the results of parts, and the state of the one under way, are kept; None keeps nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        generator: torch.Generator,
        callback: Callback | None,
        bar: tqdm,
        saved: Checkpoint | None,
    ) -> None:
        self.model, self.generator, self.callback, self.bar = model, generator, callback, bar
        self.saved, self.count = saved, 0

    def run(
        self,
        part: GradientMatching,
        observation: Observation,
        *,
        spent: int,
        steps: int,
        name: str,
        within: Within | None = None,
    ) -> Reconstruction:
        """Run a part.

        Args:
            part: what is run.
            observation: what the server saw, known to fit the model.
            spent: steps of earlier parts, as the callback counts them.
            steps: of all parts together, likewise.
            name: what the progress bar calls it.
            within: of a part that seeks one image of several, how they are put together, and how many they
                are: it takes only that part of an evaluation.
        """
        began, saved = time.perf_counter(), self.saved
        self.count += 1
        self.bar.set_description(name)
        if saved is not None and self.count <= len(saved.done):
            result, state = saved.done[self.count - 1]
            self.generator.set_state(state)
            self.bar.update(result.evaluations // (within[1] if within else 1))
            return result
        problem = part.problem(self.model, observation)
        starts = part.starts(problem, observation, self.generator)
        hooks: list[Hook] = [*([] if saved is None else [saved])]
        if within is None:
            hooks.append(Shared(self.bar))
        if self.callback is not None:
            hooks.append(Told(_continuing(self.callback, spent, steps, within)))
        result = part.searched(
            self.model, observation, problem, starts, hooks, began, seed=self.generator.initial_seed()
        )
        if within is not None:
            self.bar.update(result.evaluations // within[1])
        if saved is not None and result.status != "interrupted":
            saved.finish(result, self.generator.get_state())
        return result


def _continuing(callback: Callback, spent: int, steps: int, within: Within | None) -> Callback:
    """Return a callback to which a part of a search looks like the whole."""
    together, count = within or (None, 1)

    def watch(progress: Progress) -> bool | None:
        if (progress.step == 0 and spent > 0) or progress.step % count:
            return None  # the start of a part is the end of the one before
        images = progress.images if together is None else lambda: together(progress.images())
        return callback(replace(progress, step=spent + progress.step // count, steps=steps, images=images))

    return watch
