"""The config dict of 2020: its keys, their values, and the attack that it describes."""

import operator
import sys
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
from invlib.settings import NotNegative

Config = Mapping[str, Any] | Iterable[tuple[str, Any]]
DEFAULT_CONFIG: dict[str, Any] = {"signed": False, "boxed": True, "cost_fn": "sim", "indices": "def"}
DEFAULT_CONFIG |= {"weights": "equal", "lr": 0.1, "optim": "adam", "restarts": 1, "max_iterations": 4800}
DEFAULT_CONFIG |= {"total_variation": 1e-1, "init": "randn", "filter": "none", "lr_decay": True}
DEFAULT_CONFIG |= {"scoring_choice": "loss"}
OPTIMIZERS = ("adam", "sgd", "adamw", "LBFGS")
INITS = ("randn", "rand", "zeros")
FILTERS = ("none", "median")
SCORINGS = ("loss", "tv", "inception", "pixelmean", "pixelmedian")
_NAMES: dict[str, Collection[str]] = {"cost_fn": DISTANCES, "weights": WEIGHTS, "optim": OPTIMIZERS}
_NAMES |= {"init": INITS, "filter": FILTERS, "scoring_choice": SCORINGS}
_LEAST = {"restarts": 1, "max_iterations": 0, "total_variation": 0, "lr": 0}
# Fixed in the 2020 code, whatever `lr` says.
_SGD_LR = 0.01
_MEDIAN_EVERY = 500


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with torch's decoupled weight decay, which shrinks the values before each step.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101.
    """

    weight_decay: NotNegative = 0.01

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
    """Return a copy of a config with what is missing or None filled in, or raise ConfigError."""
    try:
        config = dict(config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config is {config!r}; expected a mapping, or pairs") from error
    unknown = [key for key in config if key not in DEFAULT_CONFIG]
    if unknown:
        wrong, known = ", ".join(map(repr, unknown)), ", ".join(DEFAULT_CONFIG)
        raise ConfigError(f"config has unknown keys {wrong}; expected some of {known}")
    full = DEFAULT_CONFIG | {key: value for key, value in config.items() if value is not None}
    for key, choices in _NAMES.items():
        named(key, full[key], choices)
    if isinstance(full["indices"], str):
        named("indices", full["indices"], SUBSETS)
    else:
        full["indices"] = numbers(full["indices"])
    for key, value in full.items():
        try:
            if key in ("signed", "boxed", "lr_decay"):
                full[key] = {0: False, 1: True}[operator.index(value + 0)]
            elif key in _LEAST:
                kind: Callable[[Any], Any] = float if key in ("lr", "total_variation") else operator.index
                if isinstance(value, bool | np.bool_ | str) or not kind(value) >= _LEAST[key]:
                    raise ValueError
                full[key] = kind(value)
        except (TypeError, ValueError, KeyError):
            wanted = f"a number of at least {_LEAST[key]}" if key in _LEAST else "True or False"
            raise ConfigError(f"config {key!r} is {value!r}; expected {wanted}") from None
    return full


def attack(config: Config = DEFAULT_CONFIG, *, generator: torch.Generator | None = None) -> GradientMatching:
    """Return the attack that a config of the 2020 code describes.

    Args:
        config: some of the keys of ``DEFAULT_CONFIG``, which fills in the others, a mapping or pairs:

            - ``signed``: use the sign of the gradient; ``boxed``: keep images in [0, 1].
            - ``cost_fn``, ``indices``, ``weights``: see `reconstruction_costs`.
            - ``optim``: ``"adam"`` and ``"adamw"`` with ``lr``; ``"sgd"``, whose step size is always 0.01;
              ``"LBFGS"``, always 1, with 20 iterations a step. ``lr_decay`` divides it by 10 three times.
            - ``restarts``, ``max_iterations`` (0 gives starting points back), weight of ``total_variation``.
            - ``init``: ``"randn"``, ``"rand"`` (uniform in [-1, 1]) or ``"zeros"``.
            - ``filter``: ``"none"``, or ``"median"`` every 500 steps.
            - ``scoring_choice`` is not the attack's but its caller's: see `GradientReconstructor`.

        generator: draws the tensors for ``indices="batch"``; None is torch's default generator.

    ConfigError where a key or a value is unknown; the message names the choices.
    """
    c = checked(config)
    if not c["max_iterations"]:
        # A step too short to move anything: 2020 gave the starting points back.
        c |= {"max_iterations": 1, "optim": "adam", "lr": sys.float_info.min}
        c |= {"boxed": False, "filter": "none"}
    kinds: dict[str, Callable[..., Optimizer]] = {"adam": Adam, "adamw": AdamW, "sgd": SGD, "LBFGS": LBFGS}
    rates = {"adam": {"lr": c["lr"]}, "adamw": {"lr": c["lr"]}, "sgd": {"lr": _SGD_LR}, "LBFGS": {}}
    objective, layers = comparison(c["cost_fn"], c["indices"], c["weights"], generator)
    return GradientMatching(
        objective=objective,
        layers=layers,
        priors=((c["total_variation"], total_variation),) if c["total_variation"] else (),
        optimizer=kinds[c["optim"]](signed=c["signed"], **rates[c["optim"]]),
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
