"""What each part of an attack buys: one setting changed at a time, at the same budget of evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from invlib.attacks.auto import best
from invlib.attacks.base import Attack
from invlib.autodiff.smoothing import Smoothing
from invlib.experiments.attacks import BEST, cosine_adam, squared_lbfgs
from invlib.experiments.cases import Case, Experiment, Setup, Size
from invlib.optim import objectives
from invlib.optim.optimizers import SGD, Adam

# A change of the published attack → the settings that it changes.
_CHANGES: dict[str, dict[str, Any]] = {
    "as published": {},
    "gradient, not its sign": {"optimizer": Adam(lr=0.1, signed=False)},
    "signed SGD for Adam": {"optimizer": SGD(lr=0.1, signed=True)},
    "no decay of the step": {"decay": None},
    "no box": {"box": False},
    "no total variation": {"tv": 0.0},
    "total variation 1e-4": {"tv": 1e-4},
    "total variation 0.1": {"tv": 0.1},
    "kinks rounded, total variation 0.1": {"smoothing": Smoothing(), "tv": 0.1},
    "squared distance": {"objective": objectives.l2},
    "absolute distance": {"objective": objectives.l1},
    "layer-wise cosine": {"objective": objectives.layerwise_cosine},
}
# What `best` is made of, each part taken out in turn.
_PARTS: dict[str, dict[str, Any]] = {
    "": {},
    "kinks as they are": {"smoothing": None},
    "pixels for coordinates": {"coordinates": None},
    "no natural prior": {"natural": 0.0},
    "no total variation": {"tv": 0.0},
    "priors that do not fade": {"fading": 1.0},
    "start from noise": {"init": "randn"},
    "no shifted copies": {"shifts": 0},
    "signed Adam": {"optimizer": Adam(lr=0.1, signed=True)},
}
_RESTARTS = 4


def _attacks(setup: Setup) -> Iterator[tuple[str, Attack]]:
    for change, settings in _CHANGES.items():
        yield change, cosine_adam(steps=setup.steps, restarts=setup.restarts, **settings)
    each = max(1, setup.steps // _RESTARTS)
    yield (
        f"{_RESTARTS} restarts of a {_RESTARTS}th of the steps",
        cosine_adam(steps=each, restarts=_RESTARTS * setup.restarts),
    )
    yield "squared distance, L-BFGS, no box", squared_lbfgs(steps=setup.steps, restarts=setup.restarts)
    for change, settings in _PARTS.items():
        name = f"{BEST}, {change}" if change else BEST
        yield name, best(steps=setup.steps, restarts=setup.restarts, **settings)


def cases(setup: Setup) -> list[Case]:
    """Return each change on a small smooth network and on a trained residual one."""
    residual = "ResNet20" if setup.reduced else "ResNet20-4"
    return [
        Case(
            columns={
                "network": network,
                "weights": "trained" if weights else "untrained",
                "attack": change,
            },
            network=network,
            weights=weights,
            attack=attack,
        )
        for network, weights in (("LeNetZhu", None), (residual, setup.slug))
        for change, attack in _attacks(setup)
    ]


EXPERIMENT = Experiment(
    title="what each part of an attack buys, one change at a time",
    cases=cases,
    full=Size(images=20, steps=4800),
    reduced=Size(images=2, steps=400),
    notes=(
        "As published: cosine objective, Adam on the gradient's sign, total variation 1e-2, box, a step that "
        "falls tenfold at 3/8, 5/8 and 7/8. This project's best is the closed form where the network is a "
        "chain of layers that can be undone, as LeNetZhu is, and its parts do not matter there. Elsewhere it "
        "is L-BFGS in the coordinates of natural images, on smoothed ReLUs (rounded kinks), with priors "
        "whose weights decay (fade); each line below it leaves one part out.",
    ),
)
