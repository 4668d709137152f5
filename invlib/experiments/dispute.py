"""Whether gradient inversion matters: one attack on every client that publications disagree about."""

from __future__ import annotations

from itertools import product
from typing import get_args

from invlib.attacks.auto import best
from invlib.experiments.attacks import OnTheWay
from invlib.experiments.cases import Case, Experiment, Mode, Setup, Size
from invlib.federated import FedAvg, FedSGD

_REDUCED = ("ResNet20", "ConvNet8", "ViT")
_FULL = (*_REDUCED, "ResNet20-preactivation")  # the last one's trained weights do not come with the project
_MODES: tuple[Mode, ...] = get_args(Mode)
_CLIENTS = ((1, 1), (4, 1), (1, 4), (1, 16))  # images and local steps
_RATE = 1e-3


def cases(setup: Setup) -> list[Case]:
    """Return a case for each network, its weights, the client's mode, its images and local steps.

    The full form has a network of pre-activation blocks too, eight images, and four with several local steps.
    """
    networks = _REDUCED if setup.reduced else _FULL
    clients = _CLIENTS if setup.reduced else (*_CLIENTS, (8, 1), (4, 4), (4, 16))
    made = []
    for network, trained, mode, (images, steps) in product(networks, (False, True), _MODES, clients):
        if network == "ViT" and mode != "evaluation":
            continue  # it has no batch norm, and its dropout in training is in `experiment transformers`
        search = best(evaluations=setup.steps, restarts=setup.restarts)
        made.append(
            Case(
                columns={
                    "network": network,
                    "weights": "trained" if trained else "fresh",
                    "mode": mode,
                    "images": str(images),
                    "local steps": str(steps),
                },
                network=network,
                weights=setup.slug if trained else None,
                attack=search if steps == 1 or network == "ViT" else OnTheWay(attack=search),
                protocol=FedSGD() if steps == 1 else FedAvg(lr=_RATE, local_steps=steps),
                images=images,
                reveal_labels=False,
                mode=mode,
            )
        )
    return made


EXPERIMENT = Experiment(
    title="fresh and trained networks, evaluation and training mode, one image and four, local steps",
    cases=cases,
    full=Size(images=8, steps=2000),
    reduced=Size(images=2, steps=300),
    notes=(
        "This project's best attack, labels hidden. Several local steps of rate 0.001 are attacked as one "
        "gradient on the client's way, those of the ViT by its closed form.",
    ),
)
