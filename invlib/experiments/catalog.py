"""The paper's experiments by name."""

from __future__ import annotations

from invlib.errors import UnknownNameError
from invlib.experiments import (
    ablation,
    architecture,
    defenses,
    dispute,
    exact,
    fedavg,
    imagenet,
    multi,
    table1,
    transformers,
)
from invlib.experiments.cases import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    "table1": table1.EXPERIMENT,
    "architecture": architecture.EXPERIMENT,
    "ablation": ablation.EXPERIMENT,
    "fedavg": fedavg.EXPERIMENT,
    "multi": multi.EXPERIMENT,
    "imagenet": imagenet.EXPERIMENT,
    "exact": exact.EXPERIMENT,
    "transformers": transformers.EXPERIMENT,
    "dispute": dispute.EXPERIMENT,
    "defenses": defenses.EXPERIMENT,
}


def get(name: str) -> Experiment:
    """Return an experiment by name.

    Raises:
        UnknownNameError: there is none of that name; the message lists those there are.
    """
    if name not in EXPERIMENTS:
        raise UnknownNameError(f"no experiment {name!r}; there are: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
