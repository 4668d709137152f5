"""One restart after another on torch's tape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invlib.autodiff.gradients import GradientMode
from invlib.search.problem import Factor, Measure, Problem


def eager_step(problem: Problem) -> Measure:
    """Return a step that evaluates restarts one by one."""
    params = _leaves(problem)

    def measure(
        values: list[Tensor],
        rows: list[int],
        sharpness: float | None,
        prior_factor: Factor,
        *,
        slopes: bool = True,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        mode = GradientMode(
            kind="tape",
            recompute=problem.recompute,
            sharpness=sharpness,
            compute_dtype=problem.compute_dtype,
        )
        parts = []
        for place, row in enumerate(rows):
            one = problem.of(row)

            def cost(now: list[Tensor], one: Problem = one) -> tuple[Tensor, Tensor]:
                return one.cost(*now, prior_factor=prior_factor, params=params, mode=mode)

            parts.append(on_tape(cost, [v[place] for v in values], slopes=slopes))
        costs, objectives, directions = zip(*parts, strict=True)
        stacked = [torch.stack(column) for column in zip(*directions, strict=True)]
        return torch.stack(costs), torch.stack(objectives), stacked

    return measure


def on_tape(
    cost_of: Callable[[list[Tensor]], tuple[Tensor, Tensor]], values: list[Tensor], *, slopes: bool = True
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Evaluate costs, objectives and the costs' gradients, whatever the caller's grad mode is."""
    now = [v.detach().requires_grad_(slopes) for v in values]
    with torch.enable_grad():
        cost, objective = cost_of(now)
        parts = torch.autograd.grad(cost.sum(), now, materialize_grads=True) if slopes else ()
    # Optimisers flatten gradients, which may come with channels last.
    return cost.detach(), objective.detach(), [part.contiguous() for part in parts]


def _leaves(problem: Problem) -> dict[str, Tensor]:
    last = channels_last(problem)
    return {
        name: (p.contiguous(memory_format=torch.channels_last) if last and p.ndim == 4 else p)
        .detach()
        .requires_grad_()
        for name, p in problem.params.items()
    }


def channels_last(problem: Problem) -> bool:
    """Say whether to use channels_last; convolutions take the layout of their weights.

    The units of a GPU for low precision want it. On a CPU it gains some per cent on small networks
    (`tests/benchmarks/bench_layouts.py`), which is not worth a copy of all weights.
    """
    return problem.compute_dtype is not None and problem.like.is_cuda
