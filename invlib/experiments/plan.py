"""What a run of an experiment is about, fixed before the first attack."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from invlib.core.fingerprint import describe
from invlib.core.optional import device_of
from invlib.errors import ConfigError
from invlib.experiments import gallery as _gallery
from invlib.experiments.cases import Case, Setup
from invlib.experiments.catalog import get
from invlib.experiments.gallery import Gallery
from invlib.experiments.networks import Networks, check

# Settings that the oldest records do not know, at the value that those were made with.
ADDED_LATER: dict[str, dict[str, Any]] = {
    "GradientMatching": {
        "prune": False,
        "engine": "auto",
        "recompute": None,
        "precision": "full",
        "log_odds": None,
    },
    "FedAvg": {
        **{"shuffle": False, "orders": None, "optimizer": "sgd", "momentum": 0.0, "dampening": 0.0},
        **{"nesterov": False, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "clip_norm": None},
        **{"proximal": 0.0, "dropout": "drawn"},
    },
}
# How records described `best` before it was a dataclass: by the variables of a function inside it.
_FORMER_BEST = "best.<locals>.attack"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a run of an experiment: small, and enough for another process to make the same plan.

    Args:
        name: of the experiment.
        images: clients in each case; None, as below, takes what the form has.
        steps: network evaluations of each restart.
        restarts: starting points of each attack.
        reduced: the reduced form or the full one; None takes the full one on a GPU.
        dataset: name of the data set.
        split: ``"train"`` or ``"test"``.
        first: number of the first private image.
        only: cases with these words in their name; none of them takes all.
        seed: an image's number is added to it.
        weights: where trained weights are looked for before the shipped ones.
        device: where the attacks run.
    """

    name: str
    images: int | None = None
    steps: int | None = None
    restarts: int | None = None
    reduced: bool | None = None
    dataset: str | None = None
    split: str = "train"
    first: int | None = None
    only: tuple[str, ...] = ()
    seed: int = 0
    weights: Path = Path("models")
    device: torch.device = field(default_factory=device_of)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a run of an experiment is about, fixed before it begins.

    Args:
        request: what is asked for, with what it left open filled in (but sizes, which the form has); makes
            the same plan in another process on this machine, or one with the same files.
        cases: those that are wanted.
        known: all that this form has, by name, wanted or not.
        images: clients in each case.
        first: number of the first private image.
        settings: what all cases share, as the record holds it.
        gallery: the images.
        networks: the networks.
    """

    request: Request
    cases: Sequence[Case]
    known: dict[str, Case]
    images: int
    first: int
    settings: dict[str, Any]
    gallery: Gallery
    networks: Networks

    def tasks(self) -> list[tuple[Case, int]]:
        """Return each attack: its case and the number of its first private image, client after client."""
        return [
            (case, self.first + k * case.images)
            for k in range(self.images)
            for case in self.cases
            if case.clients is None or k < case.clients
        ]

    def case_settings(self, case: Case) -> dict[str, Any]:
        """Return every setting of a case that its rows depend on, as the record holds them."""
        return self.settings | {
            "network": case.network,
            "weights": case.weights,
            "weights_sha256": self.networks.sha256(case),
            "num_classes": case.num_classes,
            "classes": {str(old): new for old, new in case.labels.items()},
            "normalization": describe(case.normalization),
            "attack": describe(case.attack, added_later=ADDED_LATER),
            "protocol": describe(case.protocol, added_later=ADDED_LATER),
            "images": case.images,
            "labels": "known" if case.reveal_labels else "inferred",
            **({} if case.measure is None else {"measure": describe(case.measure)}),
            **({"dataset": "sentences", "split": "test"} if case.text else {}),
            **({} if case.mode == "evaluation" else {"mode": case.mode}),
        }

    def images_sha256(self) -> str:
        """Return a hash of the images, as they are rounded to 8 bits."""
        pixels = self.gallery.images.mul(255).round().to(torch.uint8).cpu().numpy()
        return hashlib.sha256(pixels.tobytes()).hexdigest()


def plan(request: Request) -> Plan:
    """Fix everything before the first attack, so that what is missing is said at once.

    Raises:
        InvlibError: a setting is out of range, or images or weights are missing.
    """
    experiment, device, split = get(request.name), request.device, request.split
    reduced = device.type == "cpu" if request.reduced is None else request.reduced
    size = experiment.reduced if reduced else experiment.full
    given = {"images": request.images, "steps": request.steps, "restarts": request.restarts}
    for key, value in (given | {"first": request.first, "seed": request.seed}).items():
        if not isinstance(value, int | None):
            raise ConfigError(f"--{key} is {value!r}; expected a whole number")
        if value is not None and key in given and value < 1:
            raise ConfigError(f"--{key} is {value}; expected at least 1")
    if not -(2**63) <= request.seed < 2**63:
        raise ConfigError(f"--seed is {request.seed}; expected a number of at most 63 bits")
    size = replace(size, **{key: value for key, value in given.items() if value is not None})
    source = _gallery.choose(request.dataset or experiment.dataset, split)
    setup = Setup(steps=size.steps, restarts=size.restarts, reduced=reduced, slug=_gallery.slug(source))
    cases = experiment.cases(setup)
    wanted = _chosen(cases, request.only)
    check(wanted, request.weights, request.name)
    pictures = [case for case in wanted if not case.text]
    count = max((c.images * min(size.images, c.clients or size.images) for c in pictures), default=1)
    gallery, begin = _gallery.load(source, split, request.first, count, device)
    full = experiment.full
    return Plan(
        request=replace(
            request, reduced=reduced, dataset=source, first=begin, weights=request.weights.absolute()
        ),
        cases=wanted,
        known={case.name: case for case in cases},
        images=size.images,
        first=begin,
        settings={
            "dataset": source,
            "split": split,
            "steps": size.steps,
            "restarts": size.restarts,
            "seed": request.seed,
            # Fewer steps than the full form has are a reduction too, whatever the networks.
            "reduced": reduced or size.steps < full.steps or size.restarts < full.restarts,
        },
        gallery=gallery,
        networks=Networks(request.weights, device, _gallery.normalization(source), _gallery.classes(source)),
    )


def _chosen(cases: Sequence[Case], only: Sequence[str]) -> list[Case]:
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "two cases have one name"
    only = (only,) if isinstance(only, str) else only
    for words in only:
        if not any(words in name for name in names):
            raise ConfigError(f"--only is {words!r}; expected a part of one of: {'; '.join(names)}")
    exact = set(only) & set(names)  # "..., 4, 1" is no "..., 4, 16"
    return [
        case
        for case in cases
        if not only or case.name in exact or any(words in case.name for words in {*only} - exact)
    ]


def current(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a record as it is written today, whose attack may be described as it was before."""
    attack = row["settings"].get("attack")
    if not isinstance(attack, dict) or attack.get("") != _FORMER_BEST:
        return row
    if row["key"] != key(row["case"], row["image"], row["settings"]):
        return row  # its settings were edited
    given = attack["settings"]
    described = {
        "": "Best",
        "matching": attack["matching"],
        "evaluations": attack["steps"],
        "tv": attack["tv"],
        "natural": attack["natural"],
        "shifts": attack.get("shifts", 0),  # the oldest did not shift
        "near_grey": "init" not in given,
        "measured_smoothing": "smoothing" not in given,
    }
    settings = {**row["settings"], "attack": described}
    return {**row, "settings": settings, "key": key(row["case"], row["image"], settings)}


def key(case: str, image: int, settings: dict[str, Any]) -> str:
    """Return what no two rows of a record share: a hash of the case, the image and all settings."""
    text = json.dumps([case, image, settings], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
