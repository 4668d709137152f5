"""All restarts at once: as one batch where the network allows it, else mapped over a stack of parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from invlib.autodiff.gradients import GradientMode
from invlib.autodiff.stacked import NotStackable
from invlib.search.engines.eager import eager_step, on_tape
from invlib.search.problem import Factor, Measure, Problem

StackedStep = Callable[..., tuple[Tensor, Tensor, list[Tensor]]]


def batched_step(problem: Problem) -> Measure:
    """Return a step that evaluates all restarts together."""
    if not problem.stackable:
        return functools.partial(_mapped_step, problem)
    stacks = functools.lru_cache(maxsize=1)(functools.partial(stacked_parameters, problem))
    step, alone = _stacked_step(problem), eager_step(problem)

    def measure(
        values: list[Tensor],
        rows: list[int],
        sharpness: float | None,
        prior_factor: Factor,
        *,
        slopes: bool = True,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        if len(rows) == 1:
            # One restart needs no stack, which would turn its convolutions into grouped ones for nothing.
            return alone(values, rows, sharpness, prior_factor, slopes=slopes)
        return step(stacks(len(rows)), values, rows, sharpness, prior_factor, slopes=slopes)

    return measure


def part_of_many(problem: Problem) -> Measure:
    """Return a step that evaluates one restart as it is evaluated within a stack, to measure its share."""
    if not problem.stackable:
        return functools.partial(_mapped_step, problem)
    return functools.partial(_stacked_step(problem), stacked_parameters(problem, 1))


def stacked_parameters(problem: Problem, restarts: int) -> dict[str, Tensor]:
    """Return the model's parameters, once for each restart."""
    # Contiguous, so that no convolution has to make a copy of its own in every step.
    return {
        name: p.detach().expand(restarts, *p.shape).contiguous().requires_grad_()
        for name, p in problem.params.items()
    }


def _stacked_step(problem: Problem) -> StackedStep:
    """Return a step of stacked parameters, whose first call shows whether the network takes one batch."""
    fits: bool | None = None

    def step(
        params: dict[str, Tensor],
        values: list[Tensor],
        rows: list[int],
        sharpness: float | None,
        prior_factor: Factor,
        *,
        slopes: bool = True,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        def run(kind: Literal["stacked", "mapped"]) -> tuple[Tensor, Tensor, list[Tensor]]:
            mode = GradientMode(
                kind=kind,
                recompute=problem.recompute,
                sharpness=sharpness,
                compute_dtype=problem.compute_dtype,
            )
            return on_tape(
                lambda now: problem.costs(
                    now, rows=rows, prior_factor=prior_factor, params=params, mode=mode
                ),
                values,
                slopes=slopes,
            )

        nonlocal fits
        if fits is None:
            try:
                first = run("stacked")
            except torch.OutOfMemoryError:
                raise
            except (NotStackable, RuntimeError):  # a tensor made for a batch of the client's size, say
                fits = False
            else:
                fits = True
                return first
        return run("stacked" if fits else "mapped")

    return step


def _mapped_step(
    problem: Problem,
    values: list[Tensor],
    rows: list[int],
    sharpness: float | None,
    prior_factor: Factor,
    *,
    slopes: bool = True,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Map the whole step over restarts, for a client of which nothing is known but that it can be called."""
    argnums = tuple(range(len(values)))
    mode = GradientMode(sharpness=sharpness)
    cost = functools.partial(problem.cost, prior_factor=prior_factor, mode=mode)
    step = torch.func.grad_and_value(cost, argnums=argnums, has_aux=True)
    parts, (costs, objectives) = torch.func.vmap(step, randomness="different")(*values)
    return costs.detach(), objectives.detach(), [part.detach() for part in parts] if slopes else []
