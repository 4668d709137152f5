"""Federated averaging: what local steps, learning rate, batch size and more images hide."""

from __future__ import annotations

from dataclasses import replace

from invlib.experiments.attacks import OnTheWay, cosine_adam
from invlib.experiments.cases import Case, Experiment, Setup, Size
from invlib.federated import FedAvg

# (local steps, learning rate, images in a step, images)
_REDUCED = (
    *((steps, lr, 1, 1) for lr in (1e-2, 1e-4) for steps in (1, 5, 10)),
    *((4, 1e-2, batch, 4) for batch in (1, 2, 4)),
)
_FULL = tuple(
    (steps, lr, batch, images)
    for images, batches in ((1, (1,)), (4, (1, 2, 4)), (8, (1, 4, 8)))
    for batch in batches
    for lr in (1e-1, 1e-2, 1e-4)
    for steps in (1, 5, 10, 100)
)


def cases(setup: Setup) -> list[Case]:
    """Return a case for each kind of client, attacked through its local steps, or as one gradient too."""
    network = "LeNetZhu" if setup.reduced else "ConvNet64"
    attack = cosine_adam(steps=setup.steps, restarts=setup.restarts)
    made = []
    for steps, lr, batch, images in _REDUCED if setup.reduced else _FULL:
        series = f"{images} image{'s' if images > 1 else ''}, {batch} in a step, rate {lr:g}"
        case = Case(
            columns={
                "network": network,
                "images": str(images),
                "batch": str(batch),
                "rate": f"{lr:g}",
                "local steps": str(steps),
            },
            network=network,
            attack=attack,
            protocol=FedAvg(lr=lr, local_steps=steps, batch_size=batch),
            images=images,
            sweep=steps,
            series=series,
        )
        made.append(case)
        if steps > 1 and images == 1:
            cheap = replace(
                case,
                columns={**case.columns, "local steps": f"{steps}, as one gradient"},
                attack=OnTheWay(attack=attack),
                series=f"{series}, as one gradient",
            )
            made.append(cheap)
    return made


EXPERIMENT = Experiment(
    title="clients that train for some steps before they send",
    cases=cases,
    full=Size(images=4, steps=4800),
    reduced=Size(images=4, steps=400),
    axis="local steps",
    log=True,
    notes=(
        "An evaluation runs all local steps of the client, so a client of 100 steps costs 100 times as much; "
        "as one gradient on the client's way it costs one.",
    ),
)
