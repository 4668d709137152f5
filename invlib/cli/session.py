"""One attack of the command line: private images, a network, what the server sees, and what comes of it."""

from __future__ import annotations

import argparse
import secrets
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invlib import data, metrics, models
from invlib.attacks.auto import best
from invlib.cli.options import attack_of, device_of
from invlib.core.normalization import NORMALIZATIONS, Normalization
from invlib.core.observation import ClientStep, Observation
from invlib.core.reconstruction import Reconstruction
from invlib.data.files import check_indices
from invlib.errors import ConfigError, DataError, RecoveryError, UnknownNameError
from invlib.federated import FedSGD, observe
from invlib.legacy import FedAvgReconstructor, GradientReconstructor
from invlib.legacy.config import checked
from invlib.legacy.models import local_training
from invlib.metrics import Report

_DTYPES = {
    "float": torch.float32,
    "float32": torch.float32,
    "double": torch.float64,
    "float64": torch.float64,
    "half": torch.float16,
    "float16": torch.float16,
}
_IMAGENET_IMAGES = 50_000  # of its validation set
_PHOTOGRAPH = 1  # which one --target_id -1 shows: a cat
_CPU_CHUNK = 4
# Its class, where the data set has one for it.
_CAT = {"CIFAR10": 3, "ImageNet": 281}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The private images of one attack: ``(N, C, H, W)`` in [0, 1], their labels, numbers and class names."""

    images: Tensor
    labels: Tensor
    ids: list[int]
    classes: list[str]
    about: str


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network that the client received, and what is known of it."""

    model: nn.Module
    normalization: Normalization
    card: dict[str, Any]
    about: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an attack gave: the reconstruction, the images in the truth's order, and how good they are."""

    reconstruction: Reconstruction
    images: Tensor
    report: Report
    feature_mse: float


class Experiment:
    """Everything that the options fix, made once for all attacks of a command.

    Args:
        args: the parsed options.
        config: the 2020 config that they describe.
        many: more than one private image is needed, over all attacks.

    Raises:
        InvlibError: an option does not fit, or data or weights are missing.
    """

    def __init__(self, args: argparse.Namespace, config: dict[str, Any], *, many: bool) -> None:
        _check(args)
        self.args, self.config = args, checked(config)
        self.optim, self.why = attack_of(args)
        self.device = device_of(args.device)
        self.seed = secrets.randbelow(2**32) if args.seed is None else args.seed
        self.generator = torch.Generator().manual_seed(self.seed)
        self.embedded = args.target_id is not None and args.target_id < 0
        self.source = _embedded(args.dataset, many) if self.embedded else args.dataset
        # ImageNet's validation set is too large to load whole: its images are read when they are asked for.
        self.gallery = None if self.source == "ImageNet" else _load(self.source, args.data_path)
        count = len(self.gallery[0]) if self.gallery else _IMAGENET_IMAGES
        if self.embedded:
            self.first = _PHOTOGRAPH if self.source.startswith("photos") and not many else 0
        elif args.target_id is None:
            self.first = int(torch.randint(count, (), generator=self.generator))
        else:
            self.first = args.target_id
        self.network = _network(args, self._image(self.first)[0], self.seed, self.device)

    def _image(self, row: int) -> tuple[Tensor, int]:
        """Return one image ``(1, C, H, W)`` and its label."""
        if self.gallery is None:
            image, label = data.load("ImageNet", root=self.args.data_path, indices=[row])
        else:
            check_indices([row], len(self.gallery[0]), self.source)
            image, label = (part[row : row + 1] for part in self.gallery)
        if self.source.startswith("photos") and row == _PHOTOGRAPH:
            return image, _CAT.get(self.args.dataset, int(label))
        return image, int(label)

    def subject(self, first: int) -> Subject:
        """Return private images from a number on, each of another class."""
        args, classes = self.args, data.class_names(self.args.dataset)
        if args.num_images > len(classes):
            raise ConfigError(
                f"--num_images is {args.num_images}; expected at most {len(classes)}, an image of each class"
            )
        picked: dict[int, tuple[int, Tensor]] = {}
        row = first
        while len(picked) < args.num_images:
            image, label = self._image(row)
            picked.setdefault(label, (row, image))
            row += 1
        labels = [(label + args.label_flip) % len(classes) for label in picked]
        rows = [row for row, _ in picked.values()]
        return Subject(
            images=torch.cat([image for _, image in picked.values()]),
            labels=torch.tensor(labels),
            ids=[args.target_id] if self.embedded and len(rows) == 1 else rows,
            classes=[classes[label] for label in labels],
            about="; ".join(data.describe(self.source, row) for row in rows),
        )

    def attack(self, subject: Subject) -> Result:
        """Let the client take its step, attack what the server sees, and only then compare."""
        args, net = self.args, self.network
        began = time.perf_counter()
        truth, labels = subject.images.to(self.device), subject.labels.to(self.device)
        client: ClientStep = FedSGD()
        if args.accumulation:
            client = local_training(args.accumulation, args.local_lr, args.batch_size)
        # --dtype is the attack's; the client computes in single precision.
        seen = observe(net.model.float(), truth, labels, client, normalization=net.normalization)
        model = net.model.to(_DTYPES[args.dtype])
        quiet = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
        with quiet if args.deterministic else nullcontext():
            if self.optim == "best":
                reconstruction = self._best(model, seen)
            else:
                reconstruction = self._as_in_2020(model, seen, began)
        if reconstruction.status == "non_finite":
            raise RecoveryError(
                f"no restart has a finite score ({len(reconstruction.trial_scores)} ran in {args.dtype}); "
                "expected at least one, as with --dtype float or a smaller --lr"
            )
        images = reconstruction.images
        report = metrics.evaluate(reconstruction, truth)
        images = images[list(report.order)]
        with torch.no_grad():
            found, true = (net.model.float()(net.normalization.encode(x)) for x in (images, truth))
        return Result(
            reconstruction=reconstruction,
            images=images,
            report=report,
            feature_mse=float((found - true).square().mean()),
        )

    def _best(self, model: nn.Module, seen: Observation) -> Reconstruction:
        config = self.config
        steps = 1 if self.args.dryrun else config["max_iterations"]
        attack = best(steps=steps, restarts=config["restarts"], tv=config["total_variation"], prune=True)
        found = attack(model, seen, generator=self.generator, progress=True)
        return replace(found, images=found.images.float())

    def _as_in_2020(self, model: nn.Module, seen: Observation, began: float) -> Reconstruction:
        args = self.args
        chunk = args.chunk or (_CPU_CHUNK if self.device.type == "cpu" else None)
        settings: dict[str, Any] = {} if self.config["indices"] == "batch" else {"chunk": chunk}
        inputs, stats = self._machine(model).reconstruct(
            list(seen.update.values()),
            None if args.soft_labels else seen.labels,
            img_shape=seen.image_shape,
            dryrun=args.dryrun,
            generator=self.generator,
            progress=True,
            keep="best",
            **settings,
        )
        images = self.network.normalization.decode(inputs.float()).clamp(0, 1)
        return Reconstruction(
            images=images,
            labels=None,
            score=stats["opt"],
            trial_scores=torch.tensor(stats["trial_scores"]),
            trials=images[None],
            status=stats["status"],
            seconds=time.perf_counter() - began,
        )

    def _machine(self, model: nn.Module) -> GradientReconstructor:
        args, normalization = self.args, self.network.normalization
        mean_std = (list(normalization.mean), list(normalization.std))
        if args.accumulation:
            machine: GradientReconstructor = FedAvgReconstructor(
                model,
                mean_std,
                args.accumulation,
                args.local_lr,
                self.config,
                num_images=args.num_images,
                batch_size=args.batch_size,
            )
        else:
            machine = GradientReconstructor(model, mean_std, self.config, num_images=args.num_images)
        machine.iDLG = not args.soft_labels
        return machine


def _check(args: argparse.Namespace) -> None:
    for flag, choices in (("dataset", NORMALIZATIONS), ("dtype", _DTYPES)):
        if getattr(args, flag) not in choices:
            raise ConfigError(f"--{flag} is {getattr(args, flag)!r}; expected one of {', '.join(choices)}")
    for flag, least in (("num_images", 1), ("accumulation", 0), ("batch_size", 0), ("chunk", 1)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise ConfigError(f"--{flag} is {value}; expected at least {least}")


def _embedded(dataset: str, many: bool) -> str:
    if dataset == "ImageNet":
        return "photos224"
    if dataset in ("MNIST", "FashionMNIST"):
        return "fashion"
    return "patches32" if many else "photos32"


def _load(name: str, root: str | None) -> tuple[Tensor, Tensor]:
    try:
        return data.load(name, root=root)
    except DataError as error:
        raise DataError(f"{error} Or attack an embedded image with --target_id -1.") from error


def _network(args: argparse.Namespace, sample: Tensor, seed: int, device: torch.device) -> Network:
    name = "ConvNet64" if args.model == "ConvNet" else args.model
    if args.dataset == "ImageNet" and name.lower() in models.names():
        name = name.lower()  # torchvision's, as in the 2020 code
    if not args.trained_model:
        model = models.build(
            name,
            num_classes=len(data.class_names(args.dataset)),
            in_channels=sample.shape[1],
            image_size=sample.shape[2],
            seed=seed,
        )
        return Network(
            model=model.to(device),
            normalization=NORMALIZATIONS[args.dataset],
            card={},
            about=f"{name}, untrained",
        )
    model, card = _trained(name, args)
    normalization = NORMALIZATIONS[args.dataset]
    if "normalization" in card:
        normalization = Normalization(**{key: tuple(v) for key, v in card["normalization"].items()})
    return Network(
        model=model.to(device),
        normalization=normalization,
        card=card,
        about=f"{name}, trained on {data.describe(args.dataset)}, accuracy {card.get('accuracy', 'unknown')}",
    )


def _trained(name: str, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """Return a trained network and its card, or raise: an untrained one never takes its place."""
    if args.dataset == "ImageNet":
        return models.build(name, weights="IMAGENET1K_V1"), {}
    slug = data.slug(args.dataset)
    own = Path(args.model_path) / f"{name}-{slug}.safetensors"
    if not own.exists() and name in models.names() and slug not in models.available().get(name, ()):
        shipped = "; ".join(f"{model} ({', '.join(sets)})" for model, sets in models.available().items())
        raise UnknownNameError(
            f"no trained weights of {name} for {args.dataset}: {own} is not there, and invlib comes with "
            f"{shipped or 'none'}. Train them with: python -m invlib train --model {name} "
            f"--dataset {args.dataset} --out {own}"
        )
    weights = own if own.exists() else slug
    model, card = models.build(name, weights=weights), models.model_card(name, weights)
    if args.epochs is not None and card.get("epochs") != args.epochs:
        raise ConfigError(
            f"--epochs is {args.epochs}, but {name}'s weights for {args.dataset} were trained for "
            f"{card.get('epochs')} epochs; leave it out, or train others"
        )
    return model, card
