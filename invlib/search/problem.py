"""What an optimisation attack minimises, for one guess or a stack of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from invlib.autodiff.gradients import PLAIN, GradientMode
from invlib.optim.optimizers import Variable
from invlib.optim.priors import Prior

Factor = float | Tensor


class Update(Protocol):
    """The client's step on a guess, restricted to the tensors that the attack compares."""

    def __call__(
        self,
        inputs: Tensor,
        targets: Tensor,
        params: dict[str, Tensor] | None = None,
        mode: GradientMode = PLAIN,
    ) -> list[Tensor]:
        """Return the update of normalised images with these labels; None takes the model's parameters."""
        ...


class Measure(Protocol):
    """Gives the cost of a stack of guesses, the objective beside it, and the cost's gradients."""

    def __call__(
        self,
        values: list[Tensor],
        rows: list[int],
        sharpness: float | None,
        prior_factor: Factor,
        *,
        slopes: bool = True,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Evaluate guesses.

        Args:
            values: images or coordinates ``(R, ...)``, and logits of labels where they are optimised.
            rows: the number of each guess among all.
            sharpness: of the softplus in the place of ReLU; None keeps ReLU.
            prior_factor: a factor of the priors' weights.
            slopes: whether the gradients are wanted, which are most of the work.

        Returns:
            Cost ``(R,)``, objective ``(R,)``, and a gradient for each entry of ``values``, where wanted.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is minimised, with everything fixed but the guess.

    Args:
        update: the client's step.
        objective: the distance of two updates.
        target: the observed update.
        params: the model's parameters.
        priors: pairs of a weight and a prior.
        variables: what is optimised: images, and labels where they are.
        labels: of the images; None where they are optimised.
        classes: how many there are; None where labels are not optimised.
        inputs: maps what is optimised, pixels or coordinates, to normalised images.
        decode: maps normalised images to [0, 1].
        encode: the inverse of ``decode``.
        shape: ``(N, C, H, W)`` of a guess.
        like: a tensor of the model's type, on its device.
        stackable: the client treats every restart of a stack by itself.
        recompute: compute local steps anew in the backward pass.
        compute_dtype: the type in which layers multiply; None keeps the parameters' own.
        activations: bytes that the client's passes through the network make; None where that is unknown.
        alpha: what the label's logit counts where log-odds take the loss's place; None where they do not.
        notes: what is doubtful about it, such as labels that were guessed, a sentence each.
    """

    update: Update
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
    compute_dtype: torch.dtype | None
    activations: int | None
    alpha: float | None = None
    notes: tuple[str, ...] = ()

    def targets(self, inputs: Tensor, logits: Tensor | None) -> Tensor:
        """Return the labels of a guess: those that are known, or the softmax of logits."""
        if logits is None:
            assert self.labels is not None
            return self.labels
        return F.softmax(logits, -1).expand(inputs.shape[0], -1)

    def cost(
        self,
        place: Tensor,
        logits: Tensor | None = None,
        *,
        prior_factor: Factor = 1.0,
        params: dict[str, Tensor] | None = None,
        mode: GradientMode = PLAIN,
    ) -> tuple[Tensor, Tensor]:
        """Return the cost of one guess, and its objective beside it.

        Args:
            place: what is optimised: normalised images, or their coordinates.
            logits: of soft labels, where they are optimised.
            prior_factor: a factor of the priors' weights.
            params: the parameters; None takes the model's.
            mode: how the client computes its gradients.
        """
        inputs = self.inputs(place)
        update = self.update(inputs, self.targets(inputs, logits), params, mode)
        objective = self.objective(update, self.target)
        total = objective
        for weight, prior in self.priors:
            total = total + prior_factor * weight * prior(inputs)
        return total, objective

    def costs(
        self,
        values: list[Tensor],
        *,
        rows: list[int],
        prior_factor: Factor,
        params: dict[str, Tensor],
        mode: GradientMode,
    ) -> tuple[Tensor, Tensor]:
        """Return `cost` for a stack of guesses, with a stack of parameters for each.

        Args:
            values: place and logits of each guess.
            rows: the number of each guess among all.
            prior_factor: as for `cost`.
            params: a stack of parameters, one for each guess.
            mode: as for `cost`.
        """

        def mapped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return torch.func.vmap(function, randomness="different")

        inputs = mapped(self.inputs)(values[0])
        targets = self.known(rows) if len(values) == 1 else mapped(self.targets)(inputs, values[1])
        # A client takes the dimension of its images first, so that it can cut minibatches from it.
        update = self.update(inputs.transpose(0, 1), targets.transpose(0, 1), params, mode)
        objective = self.distances(update, rows)
        total = objective
        for weight, prior in self.priors:
            total = total + prior_factor * weight * mapped(prior)(inputs)
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


@dataclass(frozen=True, kw_only=True)
class Joined(Problem):
    """Problems of one model and one kind of client that are solved in one run.

    Args:
        parts: the problems.
        guesses: how many restarts each has.
    """

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
