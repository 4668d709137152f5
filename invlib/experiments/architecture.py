"""Width and depth: how much the network decides what its gradient gives away."""

from __future__ import annotations

import torch

from invlib import models
from invlib.experiments.attacks import ATTACKS
from invlib.experiments.cases import Case, Experiment, Setup, Size

_REDUCED = ("ConvNet8", "ConvNet16", "ResNet20", "ResNet32")
_FULL = (
    *("ConvNet8", "ConvNet16", "ConvNet32", "ConvNet64"),
    *("ResNet20", "ResNet32", "ResNet44", "ResNet56"),
    *("ResNet18", "ResNet34", "ResNet50"),
)


def cases(setup: Setup) -> list[Case]:
    """Return each first-order attack on each network; L-BFGS on the squared distance is in table1."""
    made = []
    for network in _REDUCED if setup.reduced else _FULL:
        with torch.device("meta"):
            size = models.parameter_count(models.build(network))
        family = "ConvNet, wider" if network.startswith("ConvNet") else "ResNet, deeper"
        if network in ("ResNet18", "ResNet34", "ResNet50"):
            family = "ResNet, 64 wide, deeper"
        for attack, make in ATTACKS.items():
            if attack.startswith("l2"):
                continue
            made.append(
                Case(
                    columns={"network": network, "parameters": f"{size:,}", "attack": attack},
                    network=network,
                    attack=make(steps=setup.steps, restarts=setup.restarts),
                    sweep=size,
                    series=f"{family}; {attack}",
                )
            )
    return made


EXPERIMENT = Experiment(
    title="width and depth of untrained networks",
    cases=cases,
    full=Size(images=10, steps=4800),
    reduced=Size(images=4, steps=400),
    axis="parameters of the network",
    log=True,
)
