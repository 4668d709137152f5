"""Whole batches out of one gradient: how many images are proved, and how many of those are the client's."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

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
        deviation: of the first layer's normal weights, all biases zero; None takes torch's own.
        dtype: of the network and of what is sent.
    """

    hidden: tuple[int, ...]
    trained: bool = False
    deviation: float | None = None
    dtype: str = "float64"

    def __call__(self, plan: Any, case: Case, first: int, seed: int) -> dict[str, Any]:
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
        rows = (truth.double().flatten(1), images.double().flatten(1))
        # Without products of matrices, whose rounding is larger than what is measured here.
        far = torch.cdist(*rows, compute_mode="donot_use_mm_for_euclid_dist")
        gaps = far.square() / truth[0].numel()
        # By decibels: one exact image counts for more than many that are a little less wrong.
        for k, m in zip(*linear_sum_assignment(gaps.clamp_min(1e-40).log().cpu().numpy()), strict=True):
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
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                elif name == "linear0.weight":
                    nn.init.normal_(parameter, std=batch.deviation)
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


def _case(images: int, inputs: str, batch: Batch, clients: int | None = None) -> Case:
    published, large = batch.deviation is not None, batch.hidden[0] > 1000
    return Case(
        columns={
            "images": str(images),
            "units": str(batch.hidden[0]),
            "hidden layers": str(len(batch.hidden)),
            "weights": "normal" if published else "trained" if batch.trained else "fresh",
            "inputs": inputs,
            "numbers": batch.dtype,
        },
        network="-".join(["fully connected", *map(str, batch.hidden)]),
        attack=exact_batch(seconds=300.0 if large else 60.0),
        images=images,
        reveal_labels=False,
        normalization=UNIT if inputs == "in [0, 1]" else None,
        paper=_PUBLISHED.get(images) if published else None,
        measure=batch,
        clients=clients,
    )


def cases(setup: Setup) -> list[Case]:
    """Return a case for each network and number of images, those of a published setting last."""
    made = [
        # Where there are many images for few units all the time is used up, and nothing is found.
        _case(images, inputs, batch, clients=1 if setup.reduced and images > units / 8 else None)
        for units, layers, images in product((200, 1000), (1, 2), (4, 16, 32, 64))
        for trained, inputs in product((False, True), ("normalised", "in [0, 1]"))
        for batch in [Batch(hidden=(units, _BEHIND)[:layers], trained=trained)]
    ]
    for images, units in ((16, 200), (64, 1000)):
        made.append(_case(images, "normalised", Batch(hidden=(units, _BEHIND), dtype="float32")))
    published, wide = Batch(hidden=(1000,), deviation=0.25), Batch(hidden=(4096, _BEHIND))
    made.append(_case(128, "normalised", wide, clients=1))
    made += [_case(images, "in [0, 1]", published, clients=3) for images in _PUBLISHED]
    return [*made, _case(256, "normalised", wide, clients=1)]


EXPERIMENT = Experiment(
    title="every image of a batch, from one gradient of a fully connected network",
    cases=cases,
    full=Size(images=10, steps=1),
    reduced=Size(images=3, steps=1),
    notes=(
        "Certified: by the server, which does not know the truth. Right: above 60 dB, as only we can tell. "
        "Certified and wrong: image or label is not the client's. Whole batches: every image and every label "
        "certified and right. Paper: images recovered in Shariati and Alambardar Meybodi 2026, table II, "
        "CIFAR-10, passive server.",
    ),
)
