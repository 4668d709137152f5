"""The loop of gradient matching: restarts together, best so far kept on the device, checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from invlib.errors import ConfigError
from invlib.optimizers import Variable
from invlib.priors import Prior, median_filter
from invlib.reconstruction import Callback, History, Progress, Status
from invlib.smoothing import rounded

if TYPE_CHECKING:
    from invlib.matching import GradientMatching

CHECK_EVERY = 25  # steps between looks at the device, for early stopping and the progress bar
CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is minimised, with everything fixed but the guess."""

    update: Callable[[Tensor, Tensor], list[Tensor]]
    objective: Callable[[list[Tensor], list[Tensor]], Tensor]
    target: list[Tensor]
    priors: tuple[tuple[float, Prior], ...]
    variables: list[Variable]
    labels: Tensor | None
    classes: int
    inputs: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    like: Tensor
    fingerprint: str

    def targets(self, inputs: Tensor, logits: Tensor | None) -> Tensor:
        if logits is None:
            assert self.labels is not None
            return self.labels
        return F.softmax(logits, -1).expand(inputs.shape[0], -1)

    def cost(
        self, place: Tensor, logits: Tensor | None = None, *, fade: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the cost of one guess, and its objective beside it.

        Args:
            place: where the optimiser stands: normalised images, or their coordinates.
            logits: of soft labels, where they are optimised.
            fade: a factor of the priors' weights.
        """
        inputs = self.inputs(place)
        objective = self.objective(self.update(inputs, self.targets(inputs, logits)), self.target)
        total = objective
        for weight, prior in self.priors:
            total = total + fade * weight * prior(inputs)
        return total, objective

    def score(self, inputs: Tensor, logits: Tensor | None) -> Tensor:
        """Return the objective of one guess, without priors."""
        return self.objective(self.update(inputs, self.targets(inputs, logits)), self.target).detach()


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Where every restart ended, and which of them ran at all."""

    values: list[Tensor]
    ran: Tensor
    status: Status
    history: History
    evaluations: int


_SAVED = (
    "values",
    "best",
    "best_cost",
    "best_objective",
    "state",
    "step",
    "improved_at",
    "last_best",
    "evaluations",
    "costs",
    "objectives",
)


class _Group:
    """The restarts that run together: their values, the best of each, and what was recorded."""

    def __init__(self, attack: GradientMatching, problem: Problem, rows: range, starts: list[Tensor]) -> None:
        self.attack, self.problem, self.rows = attack, problem, rows
        self.values = [start[rows.start : rows.stop].clone() for start in starts]
        self.best = [v.clone() for v in self.values]
        self.best_cost = torch.full(
            (len(rows),), torch.inf, dtype=problem.like.dtype, device=problem.like.device
        )
        self.best_objective = self.best_cost.clone()
        self.state: dict[str, Any] = attack.optimizer.init(self.values)
        self.step = 0
        self.improved_at = 0
        self.last_best: Tensor | None = None
        self.evaluations = 0
        self.costs: list[Tensor] = []
        self.objectives: list[Tensor] = []
        self.latest: tuple[Tensor, Tensor] | None = None

    def snapshot(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SAVED}

    def restore(self, saved: dict[str, Any]) -> None:
        for name in _SAVED:
            setattr(self, name, saved[name])

    def evaluate(self, values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return cost and gradient of every restart, and keep the best point that was measured."""
        argnums = tuple(range(len(values)))
        cost_now = partial(self.problem.cost, fade=self.fade())
        differentiate = torch.func.grad_and_value(cost_now, argnums=argnums, has_aux=True)
        with rounded(self.sharpness()):
            if len(self.rows) == 1:
                # One restart needs no vmap, which would turn its convolutions into grouped ones for nothing.
                gradients, (cost, objective) = differentiate(*[v[0] for v in values])
                gradients = [g[None] for g in gradients]
                cost, objective = cost[None], objective[None]
            else:
                gradients, (cost, objective) = torch.func.vmap(differentiate, randomness="different")(*values)
        cost, objective = cost.detach(), objective.detach()
        # Costs of different sharpness or weights do not compare: there, the latest point counts as the best.
        compare = self.attack.smoothing is None and self.attack.fading == 1
        better = cost < self.best_cost if compare else torch.isfinite(cost)
        self.best_cost = torch.where(better, cost, self.best_cost)
        self.best_objective = torch.where(better, objective, self.best_objective)
        for best, value in zip(self.best, values, strict=True):
            best.copy_(torch.where(better.view(-1, *[1] * (value.ndim - 1)), value, best))
        self.latest = (cost, objective)
        self.evaluations += len(self.rows)
        return cost, [g.detach() for g in gradients]

    def sharpness(self) -> float | None:
        """Return how sharp the kinks of the network are at this step; None where they are as they are."""
        smoothing, steps = self.attack.smoothing, self.attack.steps
        return None if smoothing is None or self.step >= steps else smoothing.sharpness(self.step, steps)

    def fade(self) -> float:
        """Return the part of the priors' weights that counts at this step."""
        return float(self.attack.fading ** min(self.step / max(self.attack.steps - 1, 1), 1.0))

    def advance(self) -> None:
        attack = self.attack
        factor = 1.0 if attack.decay is None else attack.decay.factor(self.step, attack.steps)
        evaluate = self._recording() if self.step % attack.record_every == 0 else self.evaluate
        attack.optimizer.step(self.values, self.problem.variables, self.state, evaluate, factor)
        self.step += 1
        if attack.median_every is not None and self.step % attack.median_every == 0:
            images = self.values[0]
            images.copy_(median_filter(images.flatten(0, 1)).unflatten(0, images.shape[:2]))

    def _recording(self) -> Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]]:
        first = True

        def evaluate(values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            nonlocal first
            result = self.evaluate(values)
            if first:
                self.record()
                first = False
            return result

        return evaluate

    def record(self) -> None:
        assert self.latest is not None
        self.costs.append(self.latest[0])
        self.objectives.append(self.latest[1])

    def finish(self) -> None:
        """Measure where the last step led, so that it too can be the best."""
        self.evaluate(self.values)
        self.record()

    def stopped(self) -> bool:
        """Say whether early stopping applies; this waits for the device."""
        tolerance, patience = self.attack.tolerance, self.attack.patience
        if tolerance is not None and bool((self.best_objective <= tolerance).any()):
            return True
        if patience is None:
            return False
        if self.last_best is None or bool((self.best_cost < self.last_best).any()):
            self.improved_at, self.last_best = self.step, self.best_cost.clone()
        return self.step - self.improved_at >= patience

    def leader(self) -> Tensor:
        """Return the best images so far of the restart that leads, in [0, 1]."""
        leader = torch.where(torch.isfinite(self.best_cost), self.best_cost, torch.inf).argmin()
        return self.problem.decode(self.problem.inputs(self.best[0][leader])).clamp(0, 1)

    def kept(self) -> list[Tensor]:
        return self.best if self.attack.keep == "best" else self.values


def run_trials(
    attack: GradientMatching,
    problem: Problem,
    starts: list[Tensor],
    *,
    callback: Callback | None,
    progress: bool,
    checkpoint: Path | None,
) -> Trials:
    """Run all restarts, group by group, and return where each ended."""
    size = 1 if not attack.optimizer.together else (attack.chunk or attack.restarts)
    groups = [
        _Group(attack, problem, range(a, min(a + size, attack.restarts)), starts)
        for a in range(0, attack.restarts, size)
    ]
    fingerprint = f"{problem.fingerprint}\nstarts {[float(s.double().norm()) for s in starts]}"
    keeper = _Checkpoint(checkpoint, fingerprint, groups)
    keeper.load()
    status: Status = "max_steps"
    total = attack.steps * len(groups)
    done = sum(g.step for g in groups)
    with tqdm(total=total, initial=done, disable=not progress, desc="gradient matching", unit="step") as bar:
        try:
            for group in groups:
                ended = _run_group(group, callback, bar, keeper)
                if ended == "converged":
                    status = "converged"
                    if attack.tolerance is not None and bool(
                        (group.best_objective <= attack.tolerance).any()
                    ):
                        break
                elif ended == "interrupted":
                    status = "interrupted"
                    break
        except KeyboardInterrupt:
            status = "interrupted"
    if status == "interrupted":
        keeper.save()
    else:
        keeper.remove()
    return Trials(
        values=[torch.cat(parts) for parts in zip(*[g.kept() for g in groups], strict=True)],
        ran=torch.tensor([g.evaluations > 0 for g in groups for _ in g.rows]),
        status=status,
        history=_history(attack, groups),
        evaluations=sum(g.evaluations for g in groups),
    )


def _run_group(group: _Group, callback: Callback | None, bar: tqdm, keeper: _Checkpoint) -> Status:
    steps = group.attack.steps
    ended: Status = "max_steps"
    for _ in range(group.step, steps):
        if callback is not None and group.step == 0:
            callback(_progress(group))
        group.advance()
        bar.update(1)
        if group.step == steps:
            group.finish()
        if group.step % CHECK_EVERY == 0:
            if not bar.disable:
                bar.set_postfix(cost=f"{group.best_cost.min().item():.4g}", refresh=False)
            if group.stopped():
                ended = "converged"
        keeper.save_now_and_then()
        if callback is not None and callback(_progress(group)):
            ended = "interrupted"
        if ended != "max_steps":
            break
    return ended


def _progress(group: _Group) -> Progress:
    return Progress(
        step=group.step,
        steps=group.attack.steps,
        restarts=group.rows,
        images=lambda: group.leader().clone(),
        cost=lambda: float(group.best_cost.min()),
    )


def _history(attack: GradientMatching, groups: list[_Group]) -> History:
    """Line up what the groups recorded; a group that stopped early repeats nothing and is padded by NaN."""
    rows = max(len(g.costs) for g in groups)
    if rows == 0:
        return History()
    longest = max(groups, key=lambda g: len(g.costs))
    steps = [k * attack.record_every for k in range(rows)]
    if longest.step == attack.steps:
        steps[-1] = attack.steps

    def column(recorded: list[Tensor], width: int) -> Tensor:
        pad = torch.full((rows - len(recorded), width), torch.nan)
        return torch.cat([torch.stack(recorded).cpu().to(pad), pad]) if recorded else pad

    return History(
        steps=steps,
        cost=torch.cat([column(g.costs, len(g.rows)) for g in groups], 1),
        objective=torch.cat([column(g.objectives, len(g.rows)) for g in groups], 1),
    )


class _Checkpoint:
    """The state of all groups in one file, written beside and renamed."""

    def __init__(self, path: Path | None, fingerprint: str, groups: list[_Group]) -> None:
        self.path, self.fingerprint, self.groups = path, fingerprint, groups
        self.saved_at = time.monotonic()

    def load(self) -> None:
        if self.path is None or not self.path.exists():
            return
        try:
            saved = torch.load(self.path, map_location=self.groups[0].problem.like.device, weights_only=True)
        except Exception as error:
            raise ConfigError(
                f"checkpoint {self.path} cannot be read ({error}); remove it to start anew"
            ) from error
        if saved.get("fingerprint") != self.fingerprint:
            raise ConfigError(
                f"checkpoint {self.path} is of another run (other settings or another observation); "
                "remove it or name another file"
            )
        for group, state in zip(self.groups, saved["groups"], strict=True):
            group.restore(state)

    def save(self) -> None:
        if self.path is None:
            return
        beside = self.path.with_name(self.path.name + ".part")
        state = {"fingerprint": self.fingerprint, "groups": [g.snapshot() for g in self.groups]}
        torch.save(state, beside)
        os.replace(beside, self.path)
        self.saved_at = time.monotonic()

    def save_now_and_then(self) -> None:
        if self.path is not None and time.monotonic() - self.saved_at >= CHECKPOINT_SECONDS:
            self.save()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
