"""Optimisers over a list of tensors, as ``init`` and ``step``.

`Evaluate` gives the cost of each restart and its gradient. An optimiser calls it as often as it needs to; the
search, which hands it in, keeps the best point that was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from invlib import kernels
from invlib.errors import ConfigError
from invlib.optim.schedules import StepDecay as StepDecay  # iv.optimizers.StepDecay
from invlib.settings import Below1, Checked, Count, NotNegative, Positive

Values = list[Tensor]
State = dict[str, Any]
Evaluate = Callable[[Values], tuple[Tensor, Values]]


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One thing to optimise.

    Args:
        name: what it is called.
        low: lower bounds of the box that it stays in, broadcast against its values; None for none.
        high: upper bounds, likewise.
        signed: whether an optimiser that takes the sign of gradients does so here. Pixels share one scale;
            soft labels, which do not, take the plain gradient.
    """

    name: str
    low: Tensor | None = None
    high: Tensor | None = None
    signed: bool = True


class Optimizer(Protocol):
    """An optimiser; ``together`` says whether restarts may share one call.

    One that shares calls also says, in ``per_restart``, which entries of its state are tensors, or lists of
    tensors, whose first dimension is that of the restarts. Those alone are cut when restarts are pruned. An
    entry ``ended`` that is true ends the restarts.
    """

    @property
    def together(self) -> bool:
        """Whether restarts may share one call."""
        ...

    def init(self, values: Values) -> State:
        """Return the state before the first step."""
        ...

    def step(
        self, values: Values, variables: list[Variable], state: State, evaluate: Evaluate, factor: float
    ) -> None:
        """Move the values one step, in place; the step size is multiplied by ``factor``."""
        ...


def per_restart(optimizer: Optimizer) -> tuple[str, ...]:
    """Return which entries of an optimiser's state have a first dimension of restarts.

    Raises:
        ConfigError: the optimiser does not say so.
    """
    names: tuple[str, ...] | None = getattr(optimizer, "per_restart", None)
    if names is None:
        raise ConfigError(
            f"{type(optimizer).__name__} has no attribute per_restart; expected the names of those entries "
            "of its state that hold one row for each restart, such as ('m', 'v'), without which restarts "
            "cannot be pruned or split"
        )
    return names


def select(optimizer: Optimizer, state: State, index: Tensor) -> State:
    """Return the state of some restarts: what is declared per restart is cut, everything else is kept.

    Args:
        optimizer: whose state it is.
        state: of all restarts.
        index: int64, which restarts.

    Raises:
        ConfigError: the optimiser does not declare what is per restart.
    """

    def rows(value: Any) -> Any:
        return [v[index] for v in value] if isinstance(value, list) else value[index]

    return state | {name: rows(state[name]) for name in per_restart(optimizer)}


def evaluates_first(optimizer: Optimizer) -> bool:
    """Say whether a step evaluates once, before it moves anything, so that an error there changes nothing."""
    return getattr(type(optimizer), "step", None) in (Adam.step, SGD.step)


@dataclass(frozen=True, kw_only=True)
class Adam(Checked):
    r"""Adam, on the gradient or on its sign, with projection to the box after the step.

    .. math:: x \leftarrow \Pi\left(x - \eta\,\hat m / (\sqrt{\hat v} + \epsilon)\right)

    with :math:`m` and :math:`v` the running means of :math:`g` and :math:`g^2`, and :math:`g` the gradient
    or, if signed, its sign.

    Args:
        lr: the step size :math:`\eta`, in normalised image units.
        signed: use the sign of the gradient, where the variable allows it.

    Raises:
        ConfigError: a setting is out of range.

    Source: Kingma and Ba 2015, arXiv 1412.6980; signed, Geiping et al. 2020, arXiv 2003.14053, section 5.
    """

    lr: Positive = 0.1
    signed: bool = False
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    eps: NotNegative = 1e-8
    together: bool = field(default=True, init=False)
    per_restart: ClassVar[tuple[str, ...]] = ("m", "v")

    def init(self, values: Values) -> State:
        """Return the state before the first step."""
        return {
            "step": 0,
            "m": [torch.zeros_like(v) for v in values],
            "v": [torch.zeros_like(v) for v in values],
        }

    def step(
        self, values: Values, variables: list[Variable], state: State, evaluate: Evaluate, factor: float
    ) -> None:
        """Move the values one step, in place."""
        _, gradients = evaluate(values)
        state["step"] += 1
        for value, gradient, m, v, variable in zip(
            values, gradients, state["m"], state["v"], variables, strict=True
        ):
            kernels.adam_step_(
                value,
                gradient,
                m,
                v,
                step=state["step"],
                lr=self.lr * factor,
                betas=self.betas,
                eps=self.eps,
                signed=self.signed and variable.signed,
                low=variable.low,
                high=variable.high,
            )


@dataclass(frozen=True, kw_only=True)
class SGD(Checked):
    r"""Gradient descent with Nesterov momentum, on the gradient or on its sign, projected to the box.

    .. math:: u \leftarrow \mu u + g,\quad x \leftarrow \Pi\left(x - \eta (g + \mu u)\right)

    Args:
        lr: the step size :math:`\eta`.
        momentum: :math:`\mu` in [0, 1).
        signed: as for `Adam`.

    Raises:
        ConfigError: a setting is out of range.

    Source: Sutskever et al. 2013, in the form that torch.optim.SGD gives it.
    """

    lr: Positive = 0.1
    momentum: Below1 = 0.9
    signed: bool = False
    together: bool = field(default=True, init=False)
    per_restart: ClassVar[tuple[str, ...]] = ("u",)

    def init(self, values: Values) -> State:
        """Return the state before the first step."""
        return {"u": [torch.zeros_like(v) for v in values]}

    def step(
        self, values: Values, variables: list[Variable], state: State, evaluate: Evaluate, factor: float
    ) -> None:
        """Move the values one step, in place."""
        _, gradients = evaluate(values)
        for value, gradient, u, variable in zip(values, gradients, state["u"], variables, strict=True):
            g = gradient.sign() if self.signed and variable.signed else gradient
            u.mul_(self.momentum).add_(g)
            value.sub_(self.lr * factor * (g + self.momentum * u))
            project_(value, variable)


@dataclass(frozen=True, kw_only=True)
class LBFGS(Checked):
    """The limited-memory quasi-Newton method of torch, one restart at a time.

    One step of the attack is up to ``max_iter`` iterations, each with one evaluation or, with a line
    search, a few. A cost that is NaN ends the restart where its last step began.

    Args:
        lr: the step size; 1 is the quasi-Newton step.
        max_iter: iterations in a step.
        max_eval: evaluations in a step, up to the end of the line search that reaches it; None is a
            quarter more than ``max_iter``.
        history_size: how many pairs approximate the curvature.
        tolerance_grad: a step ends where no slope is larger than this.
        tolerance_change: a step ends where cost or values change by less than this. Torch's tolerances, the
            defaults, are large beside the costs of networks whose gradients all point nearly the same way.
        line_search: ``"strong_wolfe"`` or None.
        signed: as for `Adam` (the 2020 code allows it; it defeats the curvature).

    Raises:
        ConfigError: a setting is out of range, or the line search unknown.

    Source: Liu and Nocedal 1989; `torch.optim.LBFGS`.
    """

    lr: Positive = 1.0
    max_iter: Count = 20
    max_eval: Count | None = None
    history_size: Count = 100
    tolerance_grad: NotNegative = 1e-7
    tolerance_change: NotNegative = 1e-9
    line_search: Literal["strong_wolfe"] | None = None
    signed: bool = False
    together: bool = field(default=False, init=False)

    def init(self, values: Values) -> State:
        """Return the state before the first step."""
        return {}

    def step(
        self, values: Values, variables: list[Variable], state: State, evaluate: Evaluate, factor: float
    ) -> None:
        """Move the values one step, in place."""
        optimizer = torch.optim.LBFGS(
            values,
            lr=self.lr * factor,
            max_iter=self.max_iter,
            max_eval=self.max_eval,
            history_size=self.history_size,
            tolerance_grad=self.tolerance_grad,
            tolerance_change=self.tolerance_change,
            line_search_fn=self.line_search,
        )
        # The state is kept in `state`, not in the torch object, so that a checkpoint holds all of it.
        if "lbfgs" in state:
            optimizer.state[values[0]].update(state["lbfgs"])

        before = [value.clone() for value in values]

        def closure() -> Tensor:
            cost, gradients = evaluate(values)
            if cost.isnan().any():
                raise _NotANumberError  # torch's line search would fail on it
            for value, gradient, variable in zip(values, gradients, variables, strict=True):
                value.grad = gradient.sign() if self.signed and variable.signed else gradient
            return cost.sum()

        try:
            optimizer.step(closure)
            state["lbfgs"] = dict(optimizer.state[values[0]])
        except _NotANumberError:
            state["ended"] = True
            for value, start in zip(values, before, strict=True):
                value.copy_(start)
        for value, variable in zip(values, variables, strict=True):
            value.grad = None
            project_(value, variable)


class _NotANumberError(Exception):
    """A cost is NaN."""


def project_(value: Tensor, variable: Variable) -> None:
    """Bring a variable back into its box, in place."""
    if variable.low is not None and variable.high is not None:
        torch.clamp(value, variable.low, variable.high, out=value)
