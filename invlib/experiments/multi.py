"""Many images in one gradient, whose labels the server has to infer too."""

from __future__ import annotations

from invlib.experiments.attacks import cosine_adam
from invlib.experiments.cases import Case, Experiment, Setup, Size

_CLASSES = 100  # as CIFAR-100 has
_REDUCED = (("ConvNet8", (1, 2, 4, 8)),)
_FULL = (("ConvNet64", (1, 2, 4, 8, 16, 32, 64, 100)), ("ResNet32-10", (1, 8, 100)))


def cases(setup: Setup) -> list[Case]:
    """Return a case for each number of images; the label counts are inferred, not given."""
    return [
        Case(
            columns={"network": network, "images": str(count)},
            network=network,
            num_classes=_CLASSES,
            attack=cosine_adam(steps=setup.steps, restarts=setup.restarts),
            images=count,
            reveal_labels=False,
            sweep=count,
            series=network,
        )
        for network, counts in (_REDUCED if setup.reduced else _FULL)
        for count in counts
    ]


EXPERIMENT = Experiment(
    title="many images in one gradient, labels inferred",
    cases=cases,
    full=Size(images=2, steps=4800),
    reduced=Size(images=2, steps=600),
    axis="images in the gradient",
    log=True,
    notes=(
        f"Untrained networks with {_CLASSES} outputs. Reconstructions are matched to the originals by the "
        "assignment of least squared error before they are compared.",
    ),
)
