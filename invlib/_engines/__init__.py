"""What runs the step of an attack: the same cost and gradient, computed in the way that is fastest here.

``eager`` takes one restart after another on torch's tape. ``batched`` takes all of them at once: one graph,
in which each restart has its own gradient of the weights that all share. ``compiled`` traces that step as one
function and compiles it. ``graphed`` captures it as a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from invlib._engines.flat import Unfit
from invlib._engines.gradients import Way, way
from invlib.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    from invlib._problem import Problem

__all__ = ["Engine", "Fade", "Measure", "check", "choose", "measure"]

Engine = Literal["auto", "eager", "batched", "compiled", "graphed"]
Fade = float | Tensor
Measure = Callable[[list[Tensor], list[int], float | None, Fade], tuple[Tensor, Tensor, list[Tensor]]]
"""Give the cost ``(R,)``, the objective ``(R,)`` and the cost's gradients, at places ``(R, ...)``, with the
numbers of their restarts, a sharpness of the network's kinks, and a factor of the priors' weights."""

LARGE = 2_000_000  # parameters: beyond, one restart keeps a CPU busy, and a stack of them only takes memory


def check(engine: str) -> None:
    """Raise `ConfigError` where there is no such engine."""
    if engine not in get_args(Engine):
        raise ConfigError(f"GradientMatching engine is {engine!r}; expected one of {get_args(Engine)}")


def choose(
    asked: Engine, problem: Problem, *, restarts: int, together: bool, sharpening: bool, fading: bool
) -> tuple[Engine, str]:
    """Return the engine to run, and why.

    Args:
        asked: the setting.
        problem: what is minimised.
        restarts: how many there are.
        together: the optimiser takes them together.
        sharpening: the network's kinks sharpen from step to step.
        fading: the priors' weights fall from step to step.

    Raises:
        ConfigError: the engine asked for cannot run these settings.
        DeviceError: it cannot run on this device.
    """
    device = problem.like.device
    if problem.low is not None and not problem.stackable:
        raise ConfigError(
            "precision='bfloat16' needs a client of invlib, FedSGD or FedAvg, whose layers can be told; "
            "use precision='full'"
        )
    if asked == "auto":
        # A captured step has one sharpness; an optimiser that takes restarts together asks once at each.
        if device.type == "cuda" and problem.stackable and not (sharpening and together):
            return "graphed", "a GPU, whose launches a captured step does away with"
        if restarts == 1 or not together:
            return "eager", "one restart at a time"
        size = sum(p.numel() for p in problem.params.values())
        if size > LARGE and device.type == "cpu":
            return "eager", f"{size:,} parameters, with which one restart keeps a CPU busy"
        return "batched", f"{restarts} restarts of a network of {size:,} parameters"
    if asked == "compiled" and (sharpening or fading):
        raise ConfigError(
            "engine='compiled' needs a cost that stays the same, but smoothing or fading changes it from "
            "step to step; use engine='auto'"
        )
    if asked in ("compiled", "graphed") and not problem.stackable:
        raise ConfigError(
            f"engine={asked!r} needs a client of invlib, FedSGD or FedAvg, to trace; use engine='auto'"
        )
    if asked == "graphed" and device.type != "cuda":
        raise DeviceError(f"engine='graphed' needs a CUDA device, got {device}; use engine='auto'")
    return asked, "asked for"


def measure(engine: Engine, problem: Problem) -> Measure:
    """Return the function that an engine makes of a problem."""
    if engine == "eager":
        return functools.partial(_eager, problem, _leaves(problem))
    if engine == "batched":
        return _batched(problem)
    if engine == "compiled":
        from invlib._engines.compiled import compiled

        return compiled(_batched(problem), joined=hasattr(problem, "parts"))
    from invlib._engines.graphed import graphed

    return graphed(_batched(problem))


def _eager(
    problem: Problem,
    params: dict[str, Tensor],
    values: list[Tensor],
    rows: list[int],
    sharpness: float | None,
    fade: Fade,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    def cost_of(row: int) -> Callable[[list[Tensor]], tuple[Tensor, Tensor]]:
        return lambda now: problem.of(row).cost(*now, fade=fade, params=params)

    found = [
        _on_tape(
            cost_of(row),
            [v[k] for v in values],
            Way(name="tape", recompute=problem.recompute, sharpness=sharpness, low=problem.low),
        )
        for k, row in enumerate(rows)
    ]
    costs, objectives, slopes = zip(*found, strict=True)
    stacked = [torch.stack(parts) for parts in zip(*slopes, strict=True)]
    return torch.stack(costs), torch.stack(objectives), stacked


def _batched(problem: Problem) -> Measure:
    if not problem.stackable:
        return functools.partial(_mapped, problem)
    stacks = functools.lru_cache(maxsize=1)(functools.partial(_stacked, problem))
    alone = functools.cache(functools.partial(_leaves, problem))
    step = _together(problem)

    def evaluate(
        values: list[Tensor], rows: list[int], sharpness: float | None, fade: Fade
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        if len(rows) == 1:
            # One restart needs no stack, which would turn its convolutions into grouped ones for nothing.
            return _eager(problem, alone(), values, rows, sharpness, fade)
        return step(stacks(len(rows)), values, rows, sharpness, fade)

    return evaluate


def _together(problem: Problem) -> Callable[..., tuple[Tensor, Tensor, list[Tensor]]]:
    """Return a step of stacked parameters: as one batch where the network allows it, else mapped."""
    fits: bool | None = None  # until the first step shows it

    def step(
        params: dict[str, Tensor], values: list[Tensor], rows: list[int], sharpness: float | None, fade: Fade
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        def run(name: Literal["flat", "mapped"]) -> tuple[Tensor, Tensor, list[Tensor]]:
            return _on_tape(
                lambda now: problem.costs(now, rows=rows, fade=fade, params=params),
                values,
                Way(name=name, recompute=problem.recompute, sharpness=sharpness, low=problem.low),
            )

        nonlocal fits
        if fits is None:
            try:
                found = run("flat")
            except torch.OutOfMemoryError:
                raise
            except (Unfit, RuntimeError):  # a tensor made for a batch of the client's size, say
                fits = False
            else:
                fits = True
                return found
        return run("flat" if fits else "mapped")

    return step


def _on_tape(
    cost_of: Callable[[list[Tensor]], tuple[Tensor, Tensor]],
    values: list[Tensor],
    chosen: Way,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Evaluate a cost and its gradient with torch's tape, whatever the caller's grad mode is."""
    now = [v.detach().requires_grad_() for v in values]
    with torch.enable_grad(), way(chosen):
        cost, objective = cost_of(now)
        slopes = torch.autograd.grad(cost.sum(), now, materialize_grads=True)
    # Optimisers flatten slopes, which may come with channels last.
    return cost.detach(), objective.detach(), [slope.contiguous() for slope in slopes]


def _mapped(
    problem: Problem, values: list[Tensor], rows: list[int], sharpness: float | None, fade: Fade
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Map the whole step over restarts, for a client of which nothing is known but that it can be called."""
    argnums = tuple(range(len(values)))
    step = torch.func.grad_and_value(
        functools.partial(problem.cost, fade=fade), argnums=argnums, has_aux=True
    )
    with way(Way(sharpness=sharpness)):
        slopes, (cost, objective) = torch.func.vmap(step, randomness="different")(*values)
    return cost.detach(), objective.detach(), [s.detach() for s in slopes]


def _leaves(problem: Problem) -> dict[str, Tensor]:
    last = _channels_last(problem)
    return {
        name: (p.contiguous(memory_format=torch.channels_last) if last and p.ndim == 4 else p)
        .detach()
        .requires_grad_()
        for name, p in problem.params.items()
    }


def _channels_last(problem: Problem) -> bool:
    """Say whether convolutions should keep the channels of a pixel together: they follow their weights.

    A GPU's units for low precision want it. On a CPU it gains some per cent on small networks
    (`tests/benchmarks/bench_layouts.py`), which is not worth a copy of all weights.
    """
    return problem.low is not None and problem.like.is_cuda


def _stacked(problem: Problem, restarts: int) -> dict[str, Tensor]:
    # Contiguous, so that no convolution has to make a copy of its own in every step.
    return {
        name: p.detach().expand(restarts, *p.shape).contiguous().requires_grad_()
        for name, p in problem.params.items()
    }
