"""One attack of a 2020 command: private images, a network, what the server sees, and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invlib import data, metrics, models
from invlib.attacks.auto import best
from invlib.cli.options import AttackOptions, ClientOptions, ImageOptions, NetworkOptions, Request
from invlib.core.normalization import NORMALIZATIONS, Normalization
from invlib.core.observation import Observation
from invlib.core.reconstruction import Reconstruction
from invlib.data.files import check_indices
from invlib.errors import ConfigError, DataError, RecoveryError, UnknownNameError
from invlib.federated import observe
from invlib.legacy import FedAvgReconstructor, GradientReconstructor
from invlib.metrics import Report
from invlib.models import cards

_IMAGENET_IMAGES = 50_000  # of its validation set
_PHOTOGRAPH = 1  # which one --target_id -1 shows: a cat
# Its class, where the data set has one for it.
_CAT = {"CIFAR10": 3, "ImageNet": 281}
_CPU_CHUNK = 4
_EPOCHS = 120  # of the weights MODEL_EPOCHS.pth that the command of 2020 looks for


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The private images of one attack: ``(N, C, H, W)`` in [0, 1], their labels, names and class names.

    An image of a data set is named by its number, an embedded one as ``patches32-0``, and the only one by -1.
    """

    images: Tensor
    labels: Tensor
    ids: list[str]
    classes: list[str]
    about: str


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network that the client received, and what is known of it."""

    model: nn.Module
    normalization: Normalization
    card: Mapping[str, Any]
    about: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an attack gave: the reconstruction, the images in the truth's order, and how good they are."""

    reconstruction: Reconstruction
    images: Tensor
    report: Report
    feature_mse: float


class PrivateImages:
    """The images that clients draw from: those of a data set, or embedded ones.

    Args:
        options: which images.
        generator: draws the first one where no number is given.
        many: more than one is needed, over all attacks.

    Raises:
        InvlibError: the data set is missing or broken.
    """

    def __init__(self, options: ImageOptions, generator: torch.Generator, *, many: bool) -> None:
        self.options = options
        self.source = _embedded(options.dataset, many) if options.embedded else options.dataset
        # ImageNet's validation set is too large to load whole: its images are read one by one.
        self.all = None if self.source == "ImageNet" else _load(self.source, options.data_path)
        self.prefix = f"{self.source}-" if options.embedded and many else ""
        if options.embedded:
            self.first = _PHOTOGRAPH if self.source.startswith("photos") and not many else 0
        elif options.target_id is None:
            count = len(self.all[0]) if self.all else _IMAGENET_IMAGES
            self.first = int(torch.randint(count, (), generator=generator))
        else:
            self.first = options.target_id

    def one(self, row: int) -> tuple[Tensor, int]:
        """Return one image ``(1, C, H, W)`` and its label."""
        if self.all is None:
            image, label = data.load("ImageNet", root=self.options.data_path, indices=[row])
        else:
            check_indices([row], len(self.all[0]), self.source)
            image, label = (part[row : row + 1] for part in self.all)
        if self.source.startswith("photos") and row == _PHOTOGRAPH:
            return image, _CAT.get(self.options.dataset, int(label))
        return image, int(label)

    def subjects(self, clients: int) -> Iterable[Subject]:
        """Return the images of clients in a row; that there are enough is checked before the first.

        Raises:
            ConfigError: there are fewer.
        """
        firsts = [self.first + k * self.options.num_images for k in range(clients)]
        if self.all is None:  # read from their files one by one, when their turn comes
            check_indices([firsts[-1] + self.options.num_images - 1], _IMAGENET_IMAGES, self.source)
            return map(self.subject, firsts)
        return [self.subject(first) for first in firsts]

    def subject(self, first: int) -> Subject:
        """Return the images of one client from a number on, each of another class."""
        options, classes = self.options, data.class_names(self.options.dataset)
        if options.num_images > len(classes):
            raise ConfigError(
                f"--num_images is {options.num_images}; expected at most {len(classes)}, "
                "an image of each class"
            )
        picked: dict[int, tuple[int, Tensor]] = {}
        row = first
        while len(picked) < options.num_images:
            image, label = self.one(row)
            picked.setdefault(label, (row, image))
            row += 1
        labels = [(label + options.label_flip) % len(classes) for label in picked]
        rows = [row for row, _ in picked.values()]
        return Subject(
            images=torch.cat([image for _, image in picked.values()]),
            labels=torch.tensor(labels),
            ids=["-1"] if options.embedded and not self.prefix else [f"{self.prefix}{row}" for row in rows],
            classes=[classes[label] for label in labels],
            about="; ".join(data.describe(self.source, row) for row in rows),
        )


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


class Session:
    """What all attacks of a command share: its images, its network and its random numbers.

    Args:
        request: the options.
        many: more than one private image is needed, over all attacks.

    Raises:
        InvlibError: an option does not fit, or data or weights are missing.
    """

    def __init__(self, request: Request, *, many: bool) -> None:
        self.request = request
        self.generator = torch.Generator().manual_seed(request.seed)
        self.images = PrivateImages(request.images, self.generator, many=many)
        sample, _ = self.images.one(self.images.first)
        self.network = network(request.network, request.images.dataset, sample, request.seed)
        self.network.model.to(request.device)

    def attack(self, subject: Subject) -> Result:
        """Let the client take its step, attack what the server sees, and only then compare."""
        options, client = self.request.attack, self.request.client
        net, device = self.network, self.request.device
        began = time.perf_counter()
        truth, labels = subject.images.to(device), subject.labels.to(device)
        step = client.step()
        # --dtype is the attack's; the client computes in single precision.
        seen = observe(net.model.float(), truth, labels, step, normalization=net.normalization)
        model = net.model.to(options.torch_dtype)
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
        with flags if options.deterministic else nullcontext():
            if options.optim == "best":
                reconstruction = self._best(model, seen)
            else:
                reconstruction = self._as_in_2020(model, seen)
                reconstruction = replace(reconstruction, seconds=time.perf_counter() - began)
        if reconstruction.status == "non_finite":
            raise RecoveryError(
                f"no restart has a finite score ({len(reconstruction.trial_scores)} ran in {options.dtype}); "
                "expected at least one, as with --dtype float or a smaller --lr"
            )
        report = metrics.evaluate(reconstruction, truth)
        images = reconstruction.images[list(report.order)]
        with torch.no_grad():
            outputs, wanted = (net.model.float()(net.normalization.encode(x)) for x in (images, truth))
        return Result(
            reconstruction=reconstruction,
            images=images,
            report=report,
            feature_mse=float((outputs - wanted).square().mean()),
        )

    def _best(self, model: nn.Module, seen: Observation) -> Reconstruction:
        config = self.request.attack.config
        steps = 1 if self.request.dryrun else config["max_iterations"]
        attack = best(steps=steps, restarts=config["restarts"], tv=config["total_variation"], prune=True)
        reconstruction = attack(model, seen, generator=self.generator, progress=True)
        return replace(reconstruction, images=reconstruction.images.float())

    def _as_in_2020(self, model: nn.Module, seen: Observation) -> Reconstruction:
        options, normalization = self.request.attack, self.network.normalization
        chunk = options.chunk or (_CPU_CHUNK if self.request.device.type == "cpu" else None)
        settings: dict[str, Any] = {} if options.config["indices"] == "batch" else {"chunk": chunk}
        machine = reconstructor(model, normalization, self.request.client, options, seen.num_images)
        inputs, stats = machine.reconstruct(
            list(seen.update.values()),
            None if options.soft_labels else seen.labels,
            img_shape=seen.image_shape,
            dryrun=self.request.dryrun,
            generator=self.generator,
            progress=True,
            keep="best",
            **settings,
        )
        images = normalization.decode(inputs.float()).clamp(0, 1)
        return Reconstruction(
            images=images,
            labels=None,
            score=stats["opt"],
            trial_scores=torch.tensor(stats["trial_scores"]),
            trials=images[None],
            status=stats["status"],
            seconds=0.0,
        )


def reconstructor(
    model: nn.Module,
    normalization: Normalization,
    client: ClientOptions,
    attack: AttackOptions,
    num_images: int,
) -> GradientReconstructor:
    """Return the 2020 attack, which knows how the client trained."""
    mean_std = (list(normalization.mean), list(normalization.std))
    config = dict(attack.config)
    machine: GradientReconstructor
    if not client.accumulation:
        machine = GradientReconstructor(model, mean_std, config, num_images=num_images)
    else:
        machine = FedAvgReconstructor(
            model,
            mean_std,
            client.accumulation,
            client.local_lr,
            config,
            num_images=num_images,
            batch_size=client.batch_size,
        )
    machine.iDLG = not attack.soft_labels
    return machine


def network(options: NetworkOptions, dataset: str, sample: Tensor, seed: int) -> Network:
    """Return the network of the options, for images of the shape of a sample ``(1, C, H, W)``.

    Raises:
        InvlibError: there is no such network, or no trained weights of it; an untrained one never takes the
            place of a trained one.
    """
    name = "ConvNet64" if options.model == "ConvNet" else options.model
    if dataset == "ImageNet" and name.lower() in models.names():
        name = name.lower()  # torchvision's, as in the 2020 code
    shape: dict[str, Any] = {
        "num_classes": len(data.class_names(dataset)),
        "in_channels": sample.shape[1],
        "image_size": sample.shape[2],
    }
    plain, epochs = NORMALIZATIONS[dataset], _EPOCHS if options.epochs is None else options.epochs
    if not options.trained_model:
        model = models.build(name, **shape, seed=seed)
        return Network(model=model, normalization=plain, card={}, about=f"{name}, untrained")
    old = Path(options.model_path) / f"{options.model}_{epochs}.pth"
    own = cards.own_file(name, data.slug(dataset), old.parent)
    if dataset != "ImageNet" and old.is_file() and not own.is_file():
        model = models.build(name, **shape, weights=old)
        about = f"{name}, trained in 2020: {old}"
        return Network(model=model, normalization=plain, card={"epochs": epochs}, about=about)
    model, card = _trained(options, name, dataset, old)
    return Network(
        model=model,
        normalization=Normalization.from_card(card, plain),
        card=card,
        about=f"{name}, trained on {data.describe(dataset)}, accuracy {card.get('accuracy', 'unknown')}",
    )


def _trained(
    options: NetworkOptions, name: str, dataset: str, old: Path
) -> tuple[nn.Module, Mapping[str, Any]]:
    if dataset == "ImageNet":
        return models.build(name, weights="IMAGENET1K_V1"), {}
    slug = data.slug(dataset)
    folder = Path(options.model_path)
    path = cards.find(name, slug, folder)
    if path is None:
        models.build(name)  # first of all, is there such a network?
        own = cards.own_file(name, slug, folder)
        shipped = "; ".join(f"{model} ({', '.join(sets)})" for model, sets in models.available().items())
        raise UnknownNameError(
            f"no trained weights of {name} for {dataset}: there is neither {own} nor {old}, and invlib comes "
            f"with {shipped or 'none'}. Train them with: {cards.training_command(name, dataset, own)}"
        )
    trained = cards.load(path, name)
    if options.epochs is not None and trained.card.get("epochs") != options.epochs:
        raise ConfigError(
            f"--epochs is {options.epochs}, but {name}'s weights for {dataset} were trained for "
            f"{trained.card.get('epochs')} epochs; leave it out, or train others"
        )
    return trained.model, trained.card
