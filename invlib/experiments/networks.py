"""The networks that are attacked, and the one that looks at what comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from invlib import models
from invlib.core.normalization import Normalization
from invlib.errors import DataError, DeviceError, UnknownNameError
from invlib.experiments.cases import Case
from invlib.metrics.identification import Features
from invlib.models import cards
from invlib.models.weights import locate

_BY_SLUG = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST", "mnist": "MNIST"}
# Who looks at reconstructions, best first, by the channels of the images; never the attacked network itself.
_JUDGES = {
    3: (("ConvNet8", "cifar10"), ("ResNet20", "cifar10")),
    1: (("ConvNet8", "fashion-mnist"), ("LeNetZhu", "fashion-mnist")),
}


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network that a client received, how it encodes images, and where its weights are from."""

    model: nn.Module
    normalization: Normalization
    weights_sha256: str | None
    accuracy: float | None


def check(cases: Iterable[Case], folder: Path, where: str) -> None:
    """See that all trained weights are at hand before the first attack.

    Raises:
        DataError: some are missing; the message has the commands that make them.
    """
    missing = {
        (case.network, case.weights)
        for case in cases
        if case.weights is not None
        and not _from_elsewhere(case)
        and cards.find(case.network, case.weights, folder) is None
    }
    if missing:
        files = [cards.own_file(*pair, folder) for pair in sorted(missing)]
        commands = [_training(*pair, folder) for pair in sorted(missing)]
        raise DataError(
            f"{where} needs trained weights that are not here: {', '.join(map(str, files))}. "
            f"Make them with: {' && '.join(commands)}"
        )


def _from_elsewhere(case: Case) -> bool:
    """Say whether a case's weights come with a package, as do all of the networks with lower-case names."""
    return case.build is not None or case.network[0].islower()


def _training(network: str, slug: str, folder: Path) -> str:
    base = next((known for known in _BY_SLUG if slug == known or slug.startswith(f"{known}-")), slug)
    flags = ["--no-batch-norm"] if slug.endswith("-no-batch-norm") else []
    out = cards.own_file(network, slug, folder)
    return cards.training_command(network, _BY_SLUG.get(base, base), out, *flags)


class Networks:
    """Builds each network once where it is trained, and anew for each client where it is not.

    Args:
        folder: where weights are looked for before the shipped ones.
        device: where the networks run.
        normalization: how images are encoded where no model card says otherwise.
        num_classes: outputs of untrained networks.
    """

    def __init__(
        self, folder: Path, device: torch.device, normalization: Normalization, num_classes: int
    ) -> None:
        self.folder, self.device = folder, device
        self.normalization, self.num_classes = normalization, num_classes
        self._trained: dict[tuple[str, str], Network] = {}
        self._judges: dict[tuple[str, str | None, int], Features | None] = {}

    def get(self, case: Case, seed: int, shape: tuple[int, int, int]) -> Network:
        """Return the network of a case for one client, whose images have a shape ``(C, H, W)``.

        Raises:
            InvlibError: weights or settings do not fit.
        """
        if case.weights is not None and case.build is None:
            key = (case.network, case.weights)
            if key not in self._trained:
                self._trained[key] = self._load(case)
            return self._trained[key]
        if case.build is not None:
            model = case.build(seed)
        else:
            model = models.build(
                case.network,
                num_classes=case.num_classes or self.num_classes,
                in_channels=shape[0],
                image_size=shape[1],
                seed=seed,
            )
        return Network(
            model=model.to(self.device).eval(),
            normalization=case.normalization or self.normalization,
            weights_sha256=None,
            accuracy=None,
        )

    def sha256(self, case: Case) -> str | None:
        """Return the hash of a case's weights file, None where it has none; the start of it is enough."""
        if case.weights is None or _from_elsewhere(case):
            return None
        path = cards.find(case.network, case.weights, self.folder)
        return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def _load(self, case: Case) -> Network:
        assert case.weights is not None
        if _from_elsewhere(case):
            model, card = models.build(case.network, weights=case.weights), {}
            with suppress(UnknownNameError, DataError):  # torchvision's have no card
                card = models.model_card(case.network, case.weights)
        else:
            path = cards.find(case.network, case.weights, self.folder)
            if path is None:
                raise DataError(f"trained weights {case.weights!r} of {case.network} are no longer there")
            trained = cards.load(path, case.network)
            model, card = trained.model, trained.card
        return Network(
            model=model.to(self.device),
            normalization=case.normalization or Normalization.from_card(card, self.normalization),
            weights_sha256=self.sha256(case),
            accuracy=card.get("accuracy"),
        )

    def judge(self, case: Case, channels: int) -> Features | None:
        """Return the network that compares features: a shipped one, and never the attacked one."""
        key = (case.network, case.weights, channels)
        if key not in self._judges:
            self._judges[key] = None
            for name, slug in _JUDGES.get(channels, ()):
                if (name, slug) == (case.network, case.weights):
                    continue
                try:
                    trained = cards.load(locate(name, slug))
                except (UnknownNameError, DataError, DeviceError):
                    continue
                self._judges[key] = Features(
                    trained.model.to(self.device),
                    Normalization.from_card(trained.card, self.normalization),
                    trained.card.get("image_size", 32),
                    f"{name}-{slug}",
                )
                break
        return self._judges[key]
