"""Whole batches out of one gradient: how many images are proved, and how many of those are the client's."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from invlib import data
from invlib.attacks.exact import exact_batch
from invlib.core import files
from invlib.core.normalization import UNIT, Normalization
from invlib.errors import RecoveryError
from invlib.experiments import gallery
from invlib.experiments.cases import Case, Experiment, Setup, Size
from invlib.federated import observe
from invlib.models.mlp import FullyConnected

if TYPE_CHECKING:
    from invlib.experiments.plan import Plan

_RIGHT = 60.0  # dB, from which on an image is the client's
_BEHIND = 256  # units of a second hidden layer
_TRAINING, _STEPS, _BATCH = 1000, 300, 64  # images, steps and images of a step
# Share of the images recovered: Shariati and Alambardar Meybodi 2026, table II, CIFAR-10, passive server.
_PUBLISHED = {64: "99.4 %", 128: "66.6 %"}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A client whose network is fully connected with ReLU, and what an attack proves of its batch.

    Args:
        hidden: widths of the hidden layers.
        trained: 300 steps of SGD (rate 0.02, momentum 0.9, 64 images each) on the data set's first 1,000.
        deviation: of normal weights with zero biases; None takes torch's own.
        dtype: of the network and of what is sent.
    """

    hidden: tuple[int, ...]
    trained: bool = False
    deviation: float | None = None
    dtype: str = "float64"

    def __call__(self, plan: Plan, case: Case, first: int, seed: int) -> dict[str, Any]:
        """Attack one client, and return what its row says of it."""
        truth, labels = plan.gallery.take(range(first, first + case.images))
        normalization, dtype = case.normalization or plan.networks.normalization, getattr(torch, self.dtype)
        if self.trained:
            source = (plan.settings["dataset"], plan.settings["split"], plan.settings["seed"])
            model = copy.deepcopy(_trained(self, *source, normalization))
        else:
            model = _fresh(self, truth, plan.networks.num_classes, seed)
        model = model.to(truth.device, dtype)
        seen = observe(
            model,
            truth.to(dtype),
            labels,
            case.protocol,
            normalization=normalization,
            reveal_labels=case.reveal_labels,
        )
        try:
            found = case.attack(model, seen, generator=torch.Generator().manual_seed(seed))
        except RecoveryError as error:
            none = labels[:0]
            return {"note": str(error), **compared(truth[:0], none, none.bool(), truth, labels)}
        assert found.labels is not None
        assert found.certified is not None
        return {
            "score": found.score,
            "seconds": round(found.seconds, 3),
            "note": found.note,
            **compared(found.images, found.labels, found.certified, truth, labels),
        }


def compared(
    images: Tensor, named: Tensor, certified: Tensor, truth: Tensor, labels: Tensor
) -> dict[str, Any]:
    """Return how M images and labels that were found compare with the N true ones.

    An image that was not found has the PSNR NaN, and is shown grey.
    """
    n, proved = len(truth), int(certified.sum())
    psnr, labels_right, sure = [float("nan")] * n, 0, 0
    shown = torch.full_like(truth, 0.5)
    if len(images):
        gaps = torch.cdist(truth.double().flatten(1), images.double().flatten(1)).square() / truth[0].numel()
        for k, m in zip(*linear_sum_assignment(gaps.cpu().numpy()), strict=True):
            shown[k], psnr[k] = images[m], float(-10 * gaps[k, m].log10())
            labels_right += int(named[m] == labels[k])
            sure += int(certified[m] and psnr[k] > _RIGHT and named[m] == labels[k])
    right = sum(value > _RIGHT for value in psnr)
    return {
        "psnr": psnr,
        "labels_right": labels_right,
        "reconstruction": files.png(shown),
        "counts": {
            "certified": [proved, n],
            "right": [right, n],
            "certified and wrong": [proved - sure, proved],
            "whole batches": [int(sure == n), 1],
        },
    }


def _fresh(batch: Batch, images: Tensor, classes: int, seed: int) -> nn.Module:
    channels, side = images.shape[1:3]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = FullyConnected(
            hidden=batch.hidden, num_classes=classes, in_channels=channels, image_size=side
        )
        if batch.deviation is not None:
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=batch.deviation if parameter.ndim > 1 else 0.0)
    return model


@lru_cache(maxsize=32)
def _trained(batch: Batch, dataset: str, split: str, seed: int, normalization: Normalization) -> nn.Module:
    """Return a network that was trained on the data set's first images, the attacked ones not among them."""
    count = len(data.samples(dataset)[0]) if dataset in data.sample_names() else _TRAINING
    own = gallery.load(dataset, split, 0, min(count, _TRAINING), torch.device("cpu"))[0]
    model = _fresh(batch, own.images, gallery.classes(dataset), seed)
    x, y = normalization.encode(own.images), own.labels
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_STEPS):
        rows = torch.randperm(len(x), generator=generator)[:_BATCH]
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


def cases(setup: Setup) -> list[Case]:
    """Return the batches that are to be found whole, then those where that ends, then a published setting."""
    made = []

    def add(
        images: int, hidden: tuple[int, ...], inputs: str, *, clients: int | None = None, **more: Any
    ) -> None:
        batch = Batch(hidden=hidden, **more)
        published = batch.deviation is not None
        weights = "normal" if published else "trained" if batch.trained else "fresh"
        made.append(
            Case(
                columns={
                    "images": str(images),
                    "units": str(hidden[0]),
                    "hidden layers": str(len(hidden)),
                    "weights": weights,
                    "inputs": inputs,
                    "numbers": batch.dtype,
                },
                network="-".join(["fully connected", *map(str, hidden)]),
                attack=exact_batch(
                    seconds=300.0 if hidden[0] > 1000 else 60.0 if not setup.reduced else 20.0
                ),
                images=images,
                reveal_labels=False,
                normalization=UNIT if inputs == "in [0, 1]" else None,
                paper=_PUBLISHED.get(images) if published else None,
                measure=batch,
                clients=clients,
            )
        )

    for units, layers, images in product((200, 1000), (1, 2), (4, 16, 32, 64)):
        for trained, inputs in product((False, True), ("normalised", "in [0, 1]")):
            add(images, (units, _BEHIND)[:layers], inputs, trained=trained)
    for images, units in ((16, 200), (64, 1000)):
        add(images, (units, _BEHIND), "normalised", dtype="float32")
    for images in _PUBLISHED:
        add(images, (1000,), "in [0, 1]", deviation=0.25, clients=3)
    add(128, (4096, _BEHIND), "normalised", clients=1)
    return made


EXPERIMENT = Experiment(
    title="every image of a batch, from one gradient of a fully connected network",
    cases=cases,
    full=Size(images=10, steps=1),
    reduced=Size(images=3, steps=1),
    notes=(
        "Certified: by the server, which does not know the truth. Right: above 60 dB, which only we can tell; "
        "no floor is near it. Certified and wrong: one of the two, image or label, is not the client's. Whole "
        "batches: every image and every label certified and right. Paper: Shariati and Alambardar Meybodi "
        "2026, table II, CIFAR-10, passive server.",
    ),
)
