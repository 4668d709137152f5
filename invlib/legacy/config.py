"""The config dict of 2020: its keys, their values, and the attack that it describes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invlib.attacks.matching import GradientMatching
from invlib.errors import ConfigError
from invlib.legacy.costs import DISTANCES, SUBSETS, WEIGHTS, comparison, named, numbers
from invlib.optim.optimizers import LBFGS, SGD, Adam, Evaluate, Optimizer, State, Values, Variable
from invlib.optim.priors import total_variation
from invlib.optim.schedules import StepDecay

Config = Mapping[str, Any] | Iterable[tuple[str, Any]]
DEFAULT_CONFIG: dict[str, Any] = {
    "signed": False,
    "boxed": True,
    "cost_fn": "sim",
    "indices": "def",
    "weights": "equal",
    "lr": 0.1,
    "optim": "adam",
    "restarts": 1,
    "max_iterations": 4800,
    "total_variation": 1e-1,
    "init": "randn",
    "filter": "none",
    "lr_decay": True,
    "scoring_choice": "loss",
}
OPTIMIZERS = ("adam", "sgd", "adamw", "LBFGS")
INITS = ("randn", "rand", "zeros")
FILTERS = ("none", "median")
SCORINGS = ("loss", "tv", "inception", "pixelmean", "pixelmedian")
_NAMES: dict[str, Collection[str]] = {
    "cost_fn": DISTANCES,
    "weights": WEIGHTS,
    "optim": OPTIMIZERS,
    "init": INITS,
    "filter": FILTERS,
    "scoring_choice": SCORINGS,
}
# Fixed in the 2020 code, whatever `lr` says.
_SGD_LR = 0.01
_MEDIAN_EVERY = 500


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with torch's decoupled weight decay, which shrinks the values before each step.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101.
    """

    weight_decay: float = 0.01

    def step(
        self, values: Values, variables: list[Variable], state: State, evaluate: Evaluate, factor: float
    ) -> None:
        """Move the values one step, in place."""

        def then_decay(values: Values) -> tuple[Tensor, Values]:
            result = evaluate(values)
            for value in values:
                value.mul_(1 - self.lr * factor * self.weight_decay)
            return result

        super().step(values, variables, state, then_decay, factor)


def checked(config: Config) -> dict[str, Any]:
    """Return a copy of a config with what is missing or None filled in.

    Values may be of NumPy, 0 and 1 stand for False and True, and ``indices`` may be any iterable of numbers.

    Raises:
        ConfigError: a key or a value is unknown.
    """
    try:
        config = dict(config)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"config is {config!r}; expected a mapping, or pairs of a key and a value"
        ) from error
    unknown = [key for key in config if key not in DEFAULT_CONFIG]
    if unknown:
        raise ConfigError(
            f"config has unknown keys {', '.join(map(repr, unknown))}; "
            f"expected some of {', '.join(DEFAULT_CONFIG)}"
        )
    full = DEFAULT_CONFIG | {key: value for key, value in config.items() if value is not None}
    for key, choices in _NAMES.items():
        named(key, full[key], choices)
    if isinstance(full["indices"], str):
        named("indices", full["indices"], SUBSETS)
    else:
        full["indices"] = numbers(full["indices"])
    for key in ("signed", "boxed", "lr_decay"):
        number = _number(full[key], operator.index)
        if number not in (0, 1):
            raise ConfigError(f"config {key!r} is {full[key]!r}; expected True or False")
        full[key] = bool(number)
    for key, least, kind in (
        ("restarts", 1, operator.index),
        ("max_iterations", 0, operator.index),
        ("total_variation", 0, float),
        ("lr", 0, float),
    ):
        value = full[key]
        full[key] = None if isinstance(value, bool | np.bool_ | str) else _number(value, kind)
        if full[key] is None or not full[key] >= least:
            raise ConfigError(f"config {key!r} is {value!r}; expected a number of at least {least}")
    return full


def _number(value: Any, kind: Callable[[Any], Any]) -> Any:
    """Return the plain number, or None where there is none of that kind."""
    try:
        return kind(value.item() if isinstance(value, np.bool_) else value)
    except (TypeError, ValueError):
        return None


def attack(config: Config = DEFAULT_CONFIG, *, generator: torch.Generator | None = None) -> GradientMatching:
    """Return the attack that a config of the 2020 code describes.

    Args:
        config: some of the keys of ``DEFAULT_CONFIG``, which fills in the others, a mapping or pairs:

            - ``signed``: use the sign of the gradient; ``boxed``: keep images in [0, 1].
            - ``cost_fn``, ``indices``, ``weights``: see `reconstruction_costs`.
            - ``optim``: ``"adam"`` and ``"adamw"`` with ``lr``; ``"sgd"``, whose step size is always 0.01;
              ``"LBFGS"``, always 1, with 20 iterations a step. ``lr_decay`` divides it by 10 three times.
            - ``restarts``, ``max_iterations`` (0 gives the starting points back), ``total_variation`` (its
              weight, on normalised images).
            - ``init``: ``"randn"``, ``"rand"`` (uniform in [-1, 1]) or ``"zeros"``.
            - ``filter``: ``"none"``, or ``"median"`` every 500 steps.
            - ``scoring_choice`` is not the attack's but its caller's: see `GradientReconstructor`.

        generator: draws the tensors for ``indices="batch"``; None is torch's default generator.

    Raises:
        ConfigError: a key or a value is unknown; the message names the choices.
    """
    c = checked(config)
    if not c["max_iterations"]:
        # A step of no length from the starting points, which 2020 gave back as they were.
        c |= {"max_iterations": 1, "optim": "adam", "lr": 0.0, "boxed": False, "filter": "none"}
    optimizers: dict[str, Optimizer] = {
        "adam": Adam(lr=c["lr"], signed=c["signed"]),
        "adamw": AdamW(lr=c["lr"], signed=c["signed"]),
        "sgd": SGD(lr=_SGD_LR, signed=c["signed"]),
        "LBFGS": LBFGS(signed=c["signed"]),
    }
    objective, layers = comparison(c["cost_fn"], c["indices"], c["weights"], generator)
    return GradientMatching(
        objective=objective,
        layers=layers,
        priors=((c["total_variation"], total_variation),) if c["total_variation"] else (),
        optimizer=optimizers[c["optim"]],
        steps=c["max_iterations"],
        decay=StepDecay() if c["lr_decay"] else None,
        restarts=c["restarts"],
        init=c["init"],
        box=c["boxed"],
        median_every=_MEDIAN_EVERY if c["filter"] == "median" else None,
        keep="last",
        # Tensors that are drawn anew at every step are drawn for each restart.
        chunk=1 if c["indices"] == "batch" else None,
    )
