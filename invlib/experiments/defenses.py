"""Defences: what an attacker finds who does not know them, what one finds who does, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from invlib import defenses, metrics, models
from invlib.attacks.auto import best
from invlib.attacks.base import Attack
from invlib.attacks.patches import patch_embedding
from invlib.core import files
from invlib.core.observation import ClientStep
from invlib.errors import RecoveryError
from invlib.experiments.cases import Case, Experiment, Setup, Size
from invlib.federated import FedSGD, observe
from invlib.metrics import identification

_NETWORKS = {"LeNetZhu": True, "ViT": False, "TwoLP": False}  # whether its weights are trained
_HEADS = {"LeNetZhu": "fc", "ViT": "head", "TwoLP": "linear1"}
_CLIENTS, _BATCH, _ROUNDS, _RATE, _FOLDS = 4, 5, 60, 5e-3, 2  # of the training that measures utility
_FEW = 2  # clients that are attacked where an attack takes long
KNOWS, NAIVE, EITHER, TRAINS = "knows it", "does not know", "needs not know", "nobody: training"


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """A client with a defence, and what an attack finds in what it sends."""

    def __call__(self, plan: Any, case: Case, first: int, seed: int, layer: str = "") -> dict[str, Any]:
        """Attack one client, and return what its row says of it.

        Args:
            plan: of the run.
            case: the client, its network and the attack.
            first: number of its first image.
            seed: of the client's draws and of the attack.
            layer: where one is named, a fresh bottleneck stands in front of it; what the client draws there
                the attack does not know.
        """
        truth, labels = plan.gallery.take(range(first, first + case.images))
        net = plan.networks.get(case, seed, (truth.shape[1], truth.shape[2], truth.shape[3]))
        if layer:
            net = replace(net, model=defenses.with_bottleneck(net.model, layer, seed=seed), accuracy=None)
        generator = torch.Generator().manual_seed(seed)
        seen = observe(
            net.model,
            truth,
            labels,
            case.protocol,
            normalization=net.normalization,
            reveal_labels=case.reveal_labels,
            generator=generator,
        )
        try:
            own = seed + 1 if layer else seed
            found = case.attack(net.model, seen, generator=torch.Generator().manual_seed(own))
        except RecoveryError as error:
            return {
                "psnr": [float("nan")] * case.images,
                "labels_right": 0,
                "counts": {"identified": [0, case.images]},
                "note": str(error),
            }
        images = torch.nan_to_num(found.images.to(truth), nan=0.5).clamp(0, 1)
        report = metrics.evaluate(replace(found, images=images), truth, labels)
        ranks = []
        for k, place in enumerate(report.order):
            candidates, own = plan.gallery.candidates(first + k)
            ranks.append(
                identification.identifiability(
                    images[[place]], candidates[[own]], candidates, likeness=identification.by_ssim
                ).ranks[0]
            )
        return {
            "psnr": list(report.psnr),
            "ssim": list(report.ssim),
            "rank_ssim": ranks,
            "candidates": len(candidates),
            "counts": {"identified": [ranks.count(1), case.images]},
            "labels_right": report.labels_right,
            "score": found.score,
            "seconds": round(found.seconds, 3),
            "evaluations": found.evaluations,
            "accuracy": net.accuracy,
            "note": found.note,
            "reconstruction": files.png(images[list(report.order)]),
        }


@dataclass(frozen=True, kw_only=True)
class Training:
    """The training that a defence is meant to leave possible, on images none of which is tested.

    Four clients with five images each send their updates in each of 60 rounds, and the server takes a step
    of Adam along the mean, for which the length of updates does not matter. Half of the images are trained on
    and the others tested, and then the other way round.

    Args:
        rounds: steps of the server.
    """

    rounds: int = _ROUNDS

    def __call__(self, plan: Any, case: Case, first: int, seed: int, layer: str = "") -> dict[str, Any]:
        """Train, and return how many images a network has right that was not trained on them."""
        everything = plan.gallery
        images = plan.networks.normalization.encode(everything.images)
        right = [
            int(
                trained(
                    case.network,
                    case.protocol,
                    images[fold != k],
                    everything.labels[fold != k],
                    images[fold == k],
                    everything.labels[fold == k],
                    classes=plan.networks.num_classes,
                    rounds=self.rounds,
                    seed=seed + k,
                    layer=layer,
                ).sum()
            )
            for fold in [torch.arange(len(images)) // 10 % _FOLDS]
            for k in range(_FOLDS)
        ]
        counts = {"test images right": [sum(right), len(images)]}
        return {"psnr": [], "labels_right": None, "counts": counts}


@dataclass(frozen=True, kw_only=True)
class Precode:
    """What is measured of a network with a fresh stochastic bottleneck in front of one of its layers.

    Args:
        layer: the name of that layer.
        of: `Attacked` or `Training`.
    """

    layer: str
    of: Attacked | Training

    def __call__(self, plan: Any, case: Case, first: int, seed: int) -> dict[str, Any]:
        """Return what that says of one client."""
        return self.of(plan, case, first, seed, self.layer)


def trained(
    network: str,
    client: ClientStep,
    images: Tensor,
    labels: Tensor,
    others: Tensor,
    answers: Tensor,
    *,
    classes: int = 10,
    rounds: int = _ROUNDS,
    seed: int = 0,
    layer: str = "",
) -> Tensor:
    """Train a fresh network by rounds of defended clients, and return which of other images it has right.

    Args:
        network: a name that `invlib.models.build` knows.
        client: the step of each client; secure aggregation is one of as many clients as it says.
        images: normalised ``(N, C, H, W)``, among which each client of a round has five of its own.
        labels: int64 ``(N,)``.
        others: normalised ``(M, C, H, W)``, to be tested on.
        answers: int64 ``(M,)``.
        classes: outputs of the network.
        rounds: steps of the server.
        seed: of the network, the clients' images and what they draw.
        layer: in front of which a `invlib.defenses.Bottleneck` stands; none where empty.

    Returns:
        Bool ``(M,)``.
    """
    model = models.build(
        network, num_classes=classes, in_channels=images.shape[1], image_size=images.shape[2], seed=seed
    )
    model = (defenses.with_bottleneck(model, layer, seed=seed) if layer else model).to(images.device).eval()
    optimizer = torch.optim.Adam(model.parameters(), _RATE)
    # One for the images and one for noise, so that all clients are given the same images.
    draws, generator = (torch.Generator().manual_seed(2 * seed + k) for k in range(2))
    at_once = getattr(client, "clients", 1) * _BATCH
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for _ in range(rounds):
            rows = torch.randperm(len(images), generator=draws)[: _CLIENTS * _BATCH]
            sent = [_sent(client, model, images[own], labels[own], generator) for own in rows.split(at_once)]
            for name, parameter in model.named_parameters():
                parameter.grad = torch.stack([update[name] for update in sent]).mean(0)
            optimizer.step()
        with torch.no_grad():
            right: Tensor = model(others).argmax(1) == answers
    return right


def _sent(
    client: Any, model: torch.nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Mapping[str, Tensor]:
    step = client.drawn(len(images)) if hasattr(client, "drawn") else client
    if not hasattr(client, "release"):
        update: Mapping[str, Tensor] = step(model, images, labels)
    else:
        update = step.release(step.client(model, images, labels), generator)
    return update


def _clients(network: str) -> list[tuple[str, str, ClientStep, int]]:
    """Return each defence: its name, its strength, the client and how many images are behind an update."""
    d, head = defenses, _HEADS[network]
    clip = d.Clip(1.0)
    chains: list[tuple[str, str, list[Any]]] = [
        ("none", "", []),
        ("clip", "1", [clip]),
        *(("clip 1, noise", f"{s:g}", [clip, d.GaussianNoise(s)]) for s in (1e-4, 1e-3, 1e-2, 1e-1)),
        *(("clip 1, Laplace noise", f"{s:g}", [clip, d.LaplaceNoise(s)]) for s in (1e-3, 1e-2)),
        *(("top-k", f"{s:g}", [d.TopK(s)]) for s in (0.1, 0.01)),
        ("sign", "", [d.Sign()]),
        *(("quantisation", f"{b} bits", [d.Quantize(bits=b)]) for b in (4, 2)),
        ("bfloat16", "", [d.Transport("bfloat16")]),
        ("last layer withheld", "", [d.MaskLayer(head)]),
    ]
    made: list[tuple[str, str, ClientStep, int]] = [
        (name, strength, d.Defended(FedSGD(), tuple(chain)), 1) for name, strength, chain in chains
    ]
    if network != "ViT":  # its closed form does not read the layer that Soteria changes
        made += [("Soteria", "0.5", d.Soteria(head, share=0.5), 1)]
    made += [("mixup of 2", "", d.Mixup(1.0), 2)]
    made += [("secure aggregation", f"{n} clients", d.SecureAggregation(n), n) for n in (2, 4)]
    return made


def _hidden(client: Any) -> ClientStep | None:
    """Return the client whose defence is hidden; None where there is nothing to hide, or no way to."""
    if not hasattr(client, "public") or not getattr(client, "transforms", (None,)):
        return None
    hidden: ClientStep = replace(client, public=False)
    return hidden


def _attack(network: str, defence: str, evaluations: int, restarts: int) -> Attack:
    if network == "ViT":
        return patch_embedding()
    if defence == "mixup of 2":
        return best(evaluations=evaluations, restarts=restarts, labels="optimize")
    return best(evaluations=evaluations, restarts=restarts)


def cases(setup: Setup) -> list[Case]:
    """Return the training with each defence, then each on each network before both attackers."""
    first = next(iter(_NETWORKS))
    made = [
        Case(
            columns=_columns(first, defence, strength, TRAINS),
            network=first,
            attack=best(evaluations=setup.steps, restarts=setup.restarts),
            protocol=client,
            measure=Training(),
            clients=1,
        )
        for defence, strength, client, _ in _clients(first)
        if defence != "Soteria"  # a backward pass for each of 768 entries, in every step
    ]
    for network, learnt in _NETWORKS.items():
        for defence, strength, client, images in _clients(network):
            hidden = _hidden(client)
            sides = {EITHER: client} if hidden is None else {NAIVE: hidden, KNOWS: client}
            made += [
                Case(
                    columns=_columns(network, defence, strength, attacker),
                    network=network,
                    weights=setup.slug if learnt else None,
                    attack=_attack(network, defence, setup.steps, setup.restarts),
                    protocol=protocol,
                    images=images,
                    reveal_labels=defence != "mixup of 2",
                    measure=Attacked(),
                    clients=_FEW if network == "TwoLP" or images > 1 else None,
                )
                for attacker, protocol in sides.items()
            ]
    return [
        *made,
        _precode(first, setup, Training()),
        *(_precode(net, setup, Attacked()) for net in ("LeNetZhu", "TwoLP")),  # the ViT's is read in front
    ]


def _precode(network: str, setup: Setup, measure: Attacked | Training) -> Case:
    attacked = isinstance(measure, Attacked)
    return Case(
        columns=_columns(network, "PRECODE", "width 256", EITHER if attacked else TRAINS),
        network=network,
        weights=setup.slug if attacked and _NETWORKS[network] else None,
        attack=best(evaluations=setup.steps, restarts=setup.restarts),
        measure=Precode(layer=_HEADS[network], of=measure),
        clients=_FEW if network == "TwoLP" else None if attacked else 1,
    )


def _columns(network: str, defence: str, strength: str, attacker: str) -> dict[str, str]:
    return {"network": network, "defence": defence, "strength": strength, "attacker": attacker}


EXPERIMENT = Experiment(
    title="defences, before attackers who know them and who do not, and the training that is left",
    cases=cases,
    dataset="fashion",
    full=Size(images=16, steps=1200, restarts=2),
    reduced=Size(images=4, steps=150),
    notes=(
        "Identified: by SSIM, among all images of the sample. Strength: the clip's norm; the standard "
        "deviation of the noise in each number; the share of the numbers that are sent; the width of a fresh "
        "stochastic bottleneck in front of the last layer, whose draws nobody else knows. LeNetZhu is "
        "trained, ViT and TwoLP are not. The attack is this project's best; the ViT is read by its patch "
        "embedding. Test images right: after 60 rounds of four "
        "clients with five images each, half of the sample trained on and the other tested, and the reverse.",
    ),
)
