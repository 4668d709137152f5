"""What gradient matching minimises, for one guess or a stack of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from invlib import _engines
from invlib.optimizers import Variable
from invlib.priors import Prior


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is minimised, with everything fixed but the guess."""

    update: Callable[..., list[Tensor]]
    objective: Callable[[list[Tensor], list[Tensor]], Tensor]
    target: list[Tensor]
    params: dict[str, Tensor]
    priors: tuple[tuple[float, Prior], ...]
    variables: list[Variable]
    labels: Tensor | None
    classes: int | None
    inputs: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    like: Tensor
    stackable: bool
    recompute: bool
    low: torch.dtype | None

    def targets(self, inputs: Tensor, logits: Tensor | None) -> Tensor:
        if logits is None:
            assert self.labels is not None
            return self.labels
        return F.softmax(logits, -1).expand(inputs.shape[0], -1)

    def cost(
        self,
        place: Tensor,
        logits: Tensor | None = None,
        *,
        fade: _engines.Fade = 1.0,
        params: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the cost of one guess, and its objective beside it.

        Args:
            place: where the optimiser stands: normalised images, or their coordinates.
            logits: of soft labels, where they are optimised.
            fade: a factor of the priors' weights.
            params: the parameters; None takes the model's.
        """
        inputs = self.inputs(place)
        objective = self.objective(self.update(inputs, self.targets(inputs, logits), params), self.target)
        total = objective
        for weight, prior in self.priors:
            total = total + fade * weight * prior(inputs)
        return total, objective

    def costs(
        self, values: list[Tensor], *, rows: list[int], fade: _engines.Fade, params: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return `cost` for a stack of guesses, with a stack of parameters for each.

        Args:
            values: place and logits of each guess.
            rows: the number of each guess among all.
            fade: as for `cost`.
            params: a stack of parameters, one for each guess.
        """

        def mapped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return torch.func.vmap(function, randomness="different")

        inputs = mapped(self.inputs)(values[0])
        targets = self.known(rows) if len(values) == 1 else mapped(self.targets)(inputs, values[1])
        # A client takes the dimension of its images first, so that it can cut minibatches from it.
        update = self.update(inputs.transpose(0, 1), targets.transpose(0, 1), params)
        objective = self.distances(update, rows)
        total = objective
        for weight, prior in self.priors:
            total = total + fade * weight * mapped(prior)(inputs)
        return total, objective

    def known(self, rows: list[int]) -> Tensor:
        """Return the labels of a stack of guesses, ``(guesses, N, ...)``."""
        assert self.labels is not None
        return self.labels.expand(len(rows), *self.labels.shape)

    def distances(self, update: list[Tensor], rows: list[int]) -> Tensor:
        """Return the objective of each of a stack of updates."""
        return torch.func.vmap(lambda *parts: self.objective(list(parts), self.target))(*update)

    def of(self, row: int) -> Problem:
        """Return the problem that a guess is for."""
        return self

    def score(self, inputs: Tensor, logits: Tensor | None) -> Tensor:
        """Return the objective of one guess, without priors."""
        return self.objective(self.update(inputs, self.targets(inputs, logits)), self.target).detach()


@dataclass(frozen=True, kw_only=True)
class Joined(Problem):
    """Problems of one model and one kind of client that are solved together, so many guesses for each."""

    parts: tuple[Problem, ...]
    guesses: int

    def known(self, rows: list[int]) -> Tensor:
        """Return the labels of a stack of guesses, each of its own problem."""
        return torch.stack([self.of(row).targets(self.like, None) for row in rows])

    def distances(self, update: list[Tensor], rows: list[int]) -> Tensor:
        """Return the objective of each of a stack of updates, each to its own target."""
        targets = [torch.stack(some) for some in zip(*[self.of(row).target for row in rows], strict=True)]
        count = len(targets)
        return torch.func.vmap(lambda *both: self.objective(list(both[:count]), list(both[count:])))(
            *update, *targets
        )

    def of(self, row: int) -> Problem:
        """Return the problem that a guess is for."""
        return self.parts[row // self.guesses]
