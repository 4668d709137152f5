"""The choice of an engine by client, device, optimiser and the size of the network.

``eager`` takes one restart after another on torch's tape. ``batched`` takes all of them at once: one graph,
in which each restart has its own gradient of the weights that all share. ``graphed`` captures that step as a
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from invlib.errors import ConfigError, DeviceError
from invlib.search.engines.batched import batched_step
from invlib.search.engines.eager import eager_step
from invlib.search.engines.graphed import GraphedStep
from invlib.search.engines.guarded import Guarded
from invlib.search.problem import Measure, Problem
from invlib.search.settings import EngineName, SearchSettings

LARGE = 2_000_000  # parameters: beyond, one restart keeps a CPU busy, and a stack of them only takes memory


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What runs the steps.

    Args:
        chosen: its name.
        chosen_for: why, in a clause.
        measure: the step.
        fallback: says why steps run batched after all; gives nothing where they do not.
        guard: the step of all restarts together, where there is one.
    """

    chosen: str
    chosen_for: str
    measure: Measure
    fallback: Callable[[], str] = str
    guard: Guarded | None = None

    @property
    def name(self) -> str:
        """What really ran: a step that cannot be captured runs batched, one that cannot be mapped eagerly."""
        if self.guard is not None and self.guard.refused:
            return "eager"
        return "batched" if self.fallback() else self.chosen

    @property
    def reason(self) -> str:
        """Why that was chosen."""
        if self.guard is not None and self.guard.refused:
            return f"one restart at a time, for the network cannot take them together: {self.guard.refused}"
        fallback = self.fallback()
        return f"steps cannot be captured: {fallback}" if fallback else self.chosen_for


def choose(problem: Problem, settings: SearchSettings, restarts: int) -> Engine:
    """Return the engine that is asked for, or the one that fits.

    Args:
        problem: what is minimised.
        settings: what the loop is told.
        restarts: how many there are, of all observations.

    Raises:
        ConfigError: the engine asked for cannot run this client or precision.
        DeviceError: it cannot run on this device.
    """
    if problem.compute_dtype is not None and not problem.stackable:
        raise ConfigError(
            "precision='bfloat16' needs a client of invlib, FedSGD or FedAvg, whose layers are known; "
            "use precision='full'"
        )
    name, reason = _fitting(problem, settings, restarts)
    if settings.engine != "auto":
        name, reason = settings.engine, "asked for"
    if name == "graphed" and not problem.stackable:
        raise ConfigError("engine='graphed' needs a client of invlib, FedSGD or FedAvg; use engine='auto'")
    if name == "graphed" and problem.like.device.type != "cuda":
        raise DeviceError(
            f"engine='graphed' needs a CUDA device, got {problem.like.device}; use engine='auto'"
        )
    if name == "eager":
        return Engine(chosen=name, chosen_for=reason, measure=build(name, problem))
    guard = Guarded(build("batched", problem), build("eager", problem), insist=settings.engine == "batched")
    if name == "batched":
        return Engine(chosen=name, chosen_for=reason, measure=guard, guard=guard)
    step = GraphedStep(guard)
    return Engine(chosen=name, chosen_for=reason, measure=step, fallback=lambda: step.fallback, guard=guard)


def _fitting(problem: Problem, settings: SearchSettings, restarts: int) -> tuple[EngineName, str]:
    device, together = problem.like.device, settings.optimizer.together
    # A captured step has one sharpness; an optimiser that takes restarts together asks once at each.
    changes = settings.smoothing is not None and together
    if device.type == "cuda" and problem.stackable and not changes:
        return "graphed", "a CUDA graph avoids the overhead of launching kernels"
    if not together or min(restarts, settings.chunk or restarts) == 1:
        return "eager", "one restart at a time"
    size = sum(p.numel() for p in problem.params.values())
    if size > LARGE and device.type == "cpu":
        return "eager", f"{size:,} parameters, with which one restart keeps a CPU busy"
    return "batched", f"{min(restarts, settings.chunk or restarts)} restarts of {size:,} parameters"


def scores(problem: Problem, inputs: Tensor, logits: Tensor | None = None, *, together: int = 1) -> Tensor:
    """Return the objective of guesses, without priors, on the network as it is and in full precision.

    A distance of cosines that rounding took a little below zero is zero.

    Args:
        problem: whose objective it is.
        inputs: normalised images ``(R, N, C, H, W)``.
        logits: of soft labels ``(R, ...)``, where they are optimised.
        together: how many are evaluated at a time.
    """
    plain = replace(problem, inputs=_unchanged, priors=(), compute_dtype=None)
    measure = eager_step(plain)
    if together > 1 and problem.stackable:
        measure = Guarded(batched_step(plain), measure)
    values = [inputs] if logits is None else [inputs, logits]
    rows = torch.arange(len(inputs)).split(together)
    parts = [measure([v[r] for v in values], r.tolist(), None, 1.0, slopes=False) for r in rows]
    found = torch.cat([objective for _, objective, _ in parts])
    return found.clamp_min(0) if _from_zero(problem.objective) else found


def _from_zero(objective: object) -> bool:
    """Say whether an objective is one of cosines, which rounding alone takes below zero."""

    def inner(of: object) -> object:  # of a partial function, or where a mask is not zero
        return getattr(of, "func", None) or getattr(of, "objective", None)

    while inner(objective) not in (None, objective):  # a likelihood is its own
        objective = inner(objective)
    return getattr(objective, "__name__", "") in ("cosine", "layerwise_cosine")


def _unchanged(inputs: Tensor) -> Tensor:
    return inputs


def build(name: EngineName, problem: Problem) -> Measure:
    """Return the step of a problem, uncaptured: of all restarts together, or of one after another."""
    return eager_step(problem) if name == "eager" else batched_step(problem)
