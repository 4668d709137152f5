"""Photographs and sentences out of transformers: what rounding, noise and optimisers leave of them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from invlib import data, metrics
from invlib.attacks.patches import patch_embedding
from invlib.attacks.tokens import token_embedding
from invlib.core import files
from invlib.core.observation import ClientStep, Observation
from invlib.experiments.cases import Case, Experiment, Setup, Size
from invlib.federated import FedAvg, FedSGD, from_state_dicts, observe

_STEPS = 5  # of a client with a sentence
_LENGTH = 12  # tokens of each sentence of a batch
_MOST_FREQUENT = 2  # token; 0 and 1 are no words
_OPTIMIZERS: dict[str, Any] = {
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 1e-3}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}),
}


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """A client of a vision transformer, and what is done to its update before the server sees it.

    Args:
        dtype: what the update is rounded to.
        noise: norm of the Gaussian noise that is added, as a share of the update's.
        dropout: whether the client runs the network in training mode.
    """

    dtype: str = "float32"
    noise: float = 0.0
    dropout: bool = False

    def __call__(self, plan: Any, case: Case, first: int, seed: int) -> dict[str, Any]:
        """Attack one client, and return what its row says of it."""
        truth, labels = plan.gallery.take(range(first, first + case.images))
        net = plan.networks.get(case, seed, (truth.shape[1], truth.shape[2], truth.shape[3]))
        seen = observe(
            net.model,
            truth,
            labels,
            case.protocol,
            normalization=net.normalization,
            reveal_labels=case.reveal_labels,
            training_mode=self.dropout,
        )
        generator = torch.Generator().manual_seed(seed)
        count = sum(part.numel() for part in seen.update.values())
        norm = math.hypot(*(float(part.norm()) for part in seen.update.values()))
        each = self.noise * norm / math.sqrt(count)
        update = {
            name: (part + each * torch.randn(part.shape, generator=generator).to(part))
            .to(getattr(torch, self.dtype))
            .to(part.dtype)
            for name, part in seen.update.items()
        }
        found = case.attack(net.model, replace(seen, update=update), generator=generator)
        report = metrics.evaluate(found, truth, labels)
        assert found.certified is not None
        assert found.expected_psnr is not None
        return {
            "psnr": list(report.psnr),
            "ssim": list(report.ssim),
            "expected_psnr": found.expected_psnr.tolist(),
            "labels_right": report.labels_right,
            "counts": {"certified": [int(found.certified.sum()), case.images]},
            "score": found.score,
            "seconds": round(found.seconds, 3),
            "accuracy": net.accuracy,
            "note": found.note,
            "reconstruction": files.png(found.images),
        }


@dataclass(frozen=True, kw_only=True)
class Sentences:
    """A client whose network predicts the word after its sentences, none of which the network was trained on.

    Args:
        optimizer: what it trains with, for five steps with dropout; None sends one gradient.
    """

    optimizer: str | None = None

    def __call__(self, plan: Any, case: Case, first: int, seed: int) -> dict[str, Any]:
        """Attack one client, and return what its row says of it."""
        model = plan.networks.get(case, seed, (0, 0, 0)).model
        own = data.sentences(8) if self.optimizer else data.sentences(_LENGTH, _LENGTH)
        begin = first - plan.first
        numbers = data.encode(own[begin : begin + case.images]).to(plan.networks.device)
        tokens, labels = numbers[:, :-1], numbers[:, -1]
        if self.optimizer is None:
            seen = observe(
                model, tokens, labels, case.protocol, reveal_labels=False, vocabulary=data.vocabulary()
            )
        else:
            seen = self._trained(model, tokens, labels, case, seed)
        found = case.attack(model, seen)
        assert found.tokens is not None
        assert found.certified is not None
        right = (tokens[:, None] == found.tokens.to(tokens)).sum(2).cpu()
        matched = linear_sum_assignment(-right.numpy())
        words = right[matched]
        return {
            "psnr": [],
            "labels_right": None,
            "counts": {
                "certified": [int(found.certified.sum()), len(tokens)],
                "whole sentences": [int((words == tokens.shape[1]).sum()), len(tokens)],
                "words in place": [int(words.sum()), tokens.numel()],
                "floor of words": [int((tokens == _MOST_FREQUENT).sum()), tokens.numel()],
            },
            "score": found.score,
            "seconds": round(found.seconds, 3),
            "note": found.note,
            "sentences": list(seen.in_words(tokens.cpu())),
            "found": [found.text[k] for k in matched[1]],
        }

    def _trained(
        self, model: nn.Module, tokens: Tensor, labels: Tensor, case: Case, seed: int
    ) -> Observation:
        assert self.optimizer is not None
        moved, (make, settings) = copy.deepcopy(model).train(), _OPTIMIZERS[self.optimizer]
        optimizer = make(moved.parameters(), **settings)
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(seed)
            for _ in range(_STEPS):
                optimizer.zero_grad()
                F.cross_entropy(moved(tokens), labels).backward()
                optimizer.step()
        return from_state_dicts(
            model,
            model.state_dict(),
            moved.state_dict(),
            protocol=case.protocol,
            num_images=len(tokens),
            image_shape=(tokens.shape[1],),
            training_mode=True,
            vocabulary=data.vocabulary(),
        )


def cases(setup: Setup) -> list[Case]:
    """Return clients with a photograph each, then clients with a sentence or several."""
    steps = FedAvg(lr=0.01, local_steps=10)
    clients: dict[str, tuple[ClientStep, Photograph]] = {
        "gradient, float32": (FedSGD(), Photograph()),
        "gradient, float16": (FedSGD(), Photograph(dtype="float16")),
        "gradient, bfloat16": (FedSGD(), Photograph(dtype="bfloat16")),
        "gradient, dropout": (FedSGD(), Photograph(dropout=True)),
        "10 local steps, dropout": (steps, Photograph(dropout=True)),
        "gradient, noise 0.001": (FedSGD(), Photograph(noise=1e-3)),
        "gradient, noise 0.01": (FedSGD(), Photograph(noise=1e-2)),
    }
    made = [
        Case(
            columns={"network": f"ViT, {'trained' if weights else 'fresh'}", "client": name},
            network="ViT",
            weights=weights,
            attack=patch_embedding(),
            protocol=protocol,
            reveal_labels=False,
            measure=measure,
            clients=4,
        )
        for weights, (name, (protocol, measure)) in product((None, setup.slug), clients.items())
    ]
    texts = {
        f"a sentence, {_STEPS} steps of {name}, dropout": (
            1,
            16,
            FedAvg(lr=settings["lr"], local_steps=_STEPS),
            Sentences(optimizer=name),
        )
        for name, (_, settings) in _OPTIMIZERS.items()
    } | {f"{n} sentences, gradient": (n, 16 // n, FedSGD(), Sentences()) for n in (2, 4)}
    return made + [
        Case(
            columns={"network": "TextDecoder, trained", "client": name},
            network="TextDecoder",
            weights=data.text.SLUG,
            attack=token_embedding(),
            protocol=protocol,
            images=images,
            reveal_labels=False,
            measure=measure,
            clients=number,
            text=True,
        )
        for name, (images, number, protocol, measure) in texts.items()
    ]


EXPERIMENT = Experiment(
    title="photographs and sentences from closed forms on transformers",
    cases=cases,
    dataset="photos32",
    full=Size(images=16, steps=1),
    reduced=Size(images=16, steps=1),
    notes=(
        "Noise: its norm as a share of the update's. Whole sentences: all words in their places. Floor of "
        "words: those in place if the most frequent word is guessed everywhere. Sentences are of invlib.data."
        "sentences, which the network was not trained on.",
    ),
)
