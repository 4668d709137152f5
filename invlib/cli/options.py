"""The command-line options of the 2020 code, shared by ``reconstruct_image`` and ``rec_mult``."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from invlib.attacks import auto
from invlib.cli import since2020
from invlib.cli.status import POSITIVE, SEED, check_ranges
from invlib.core.normalization import NORMALIZATIONS
from invlib.core.optional import device_of
from invlib.errors import ConfigError
from invlib.federated import FedAvg, FedSGD
from invlib.legacy import DEFAULT_CONFIG
from invlib.legacy.config import FILTERS, INITS, OPTIMIZERS, SCORINGS, checked
from invlib.legacy.costs import DISTANCES, SUBSETS, WEIGHTS
from invlib.legacy.reconstruction_algorithms import local_training

_DTYPES = {
    "float": torch.float32,
    "float32": torch.float32,
    "double": torch.float64,
    "float64": torch.float64,
    "half": torch.float16,
    "float16": torch.float16,
}
# What --optim stands for; what `since2020.fixed` and a flag that is given say overrides it.
PRESETS: dict[str, dict[str, Any]] = {
    "ours": {**DEFAULT_CONFIG, "signed": True, "total_variation": 1e-4},
    "zhu": {
        **DEFAULT_CONFIG,
        "boxed": False,
        "cost_fn": "l2",
        "optim": "LBFGS",
        "total_variation": 1e-4,
        "lr_decay": False,
    },
    "best": {**DEFAULT_CONFIG, "max_iterations": auto.STEPS, "total_variation": auto.TV},
}
_AUTO = "auto"
# What --optim best chooses by itself (None: no flag can say it); a flag for something else would be ignored.
_CHOSEN: dict[str, Any] = {
    "cost_fn": "sim",
    "indices": "def",
    "weights": "equal",
    "optim": None,
    "signed": None,
    "boxed": None,
    "lr": None,
    "init": None,
    "filter": "none",
    "scoring_choice": "loss",
}
_RANGES = {
    "num_images": (1, 10**6),
    "accumulation": (0, 10**6),
    "local_lr": (POSITIVE, 1e6),
    "batch_size": (0, 10**7),
    "local_momentum": (0, 10),
    "restarts": (1, 10**4),
    "iterations": (1, 10**9),
    "lr": (POSITIVE, 1e6),
    "tv": (0, 1e6),
    "chunk": (1, 10**7),
    "epochs": (0, 10**9),
    "seed": SEED,
    "target_id": (-(10**9), 10**9),
}
# Config key → the name of its flag.
_FLAGS = {key: key for key in DEFAULT_CONFIG if key != "lr_decay"} | {
    "optim": "optimizer",
    "max_iterations": "iterations",
    "total_variation": "tv",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shared options to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_argument_group("the client")
    what.add_argument("--model", default="ConvNet", help="name of a network (ConvNet is ConvNet64)")
    what.add_argument("--dataset", default="CIFAR10", help="or CIFAR100, MNIST, FashionMNIST, ImageNet")
    what.add_argument("--trained_model", action="store_true", help="use trained weights")
    what.add_argument(
        "--epochs", type=int, help="insist on weights that were trained for so many epochs (their card says)"
    )
    what.add_argument("--num_images", type=int, default=1, help="private images, each of another class")
    what.add_argument(
        "--target_id",
        type=int,
        help="first validation image; -1 takes embedded images, for which no data set is needed",
    )
    what.add_argument("--label_flip", action="store_true", help="the client uses the next class as label")
    what.add_argument(
        "--accumulation", type=int, default=0, help="local steps of federated averaging; 0 sends a gradient"
    )
    what.add_argument("--local_lr", type=float, default=1e-4, help="the client's learning rate (%(default)s)")
    what.add_argument("--batch_size", type=int, default=0, help="images in a local step; 0 takes all")
    what.add_argument(
        "--local_optimizer",
        default="sgd",
        choices=["sgd", "adam", "adamw"],
        help="of the local steps; others than plain sgd with --optim best alone (%(default)s)",
    )
    what.add_argument("--local_momentum", type=float, default=0.0, help="of sgd, likewise (%(default)s)")

    how = parser.add_argument_group("the attack", "Defaults are those of --optim.")
    how.add_argument(
        "--optim",
        default=_AUTO,
        choices=[_AUTO, *PRESETS],
        help="ours: cosine and signed Adam (Geiping et al. 2020), 24000 iterations in reconstruct_image and "
        "4800 in rec_mult; zhu: squared distance and L-BFGS (Zhu et al. 2019), 300 and 500 iterations of 20; "
        f"best: this project's strongest, {auto.STEPS} evaluations; auto: best on trained weights, where the "
        "published attack finds little, unless another option asks for what best does not do, and else ours "
        "(%(default)s)",
    )
    how.add_argument(
        "--restarts",
        type=int,
        default=1,
        help="starting points (%(default)s); best stops the worse ones early",
    )
    how.add_argument("--iterations", "--max_iterations", type=int, help="steps of each restart")
    how.add_argument("--cost_fn", help=", ".join(DISTANCES))
    how.add_argument("--indices", help=f"which tensors are compared: {', '.join(SUBSETS)}")
    how.add_argument("--weights", help=f"how they are weighed: {', '.join(WEIGHTS)}")
    how.add_argument("--optimizer", help=", ".join(OPTIMIZERS))
    for flag, noun, what_it_does in since2020.SWITCHES:
        how.add_argument(f"--use_{noun}", dest=flag, action="store_true", default=None, help=what_it_does)
        how.add_argument(f"--no_{noun}", f"--no-{flag}", dest=flag, action="store_false", help="or do not")
        how.add_argument(
            f"--{flag}",
            dest=f"{flag}_of_2020",
            action="store_true",
            help=f"as in 2020: --no_{noun} in reconstruct_image, nothing in rec_mult",
        )
    how.add_argument(
        "--lr", type=float, help="step size of adam (0.1, but 1 in reconstruct_image with --accumulation)"
    )
    how.add_argument("--tv", type=float, help="weight of total variation (1e-4)")
    how.add_argument("--init", help=", ".join(INITS))
    how.add_argument("--filter", help=f"median filter every 500 steps: {', '.join(FILTERS)}")
    how.add_argument("--scoring_choice", help=f"how the result is chosen: {', '.join(SCORINGS)}")
    how.add_argument("--soft_labels", action="store_true", help="find the labels too, do not give them")
    how.add_argument("--dtype", default="float", help="float, double or half, for the attack (%(default)s)")
    how.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    how.add_argument("--chunk", type=int, help="restarts that run together (all on a GPU, 4 on a CPU)")
    how.add_argument("--seed", type=int, help="of the untrained network and the starting points; random")
    how.add_argument("--deterministic", action="store_true", help="only deterministic algorithms of cuDNN")
    how.add_argument("--dryrun", action="store_true", help="take one step and write nothing")

    files = parser.add_argument_group("files")
    files.add_argument("--save_image", action="store_true", help="save the reconstruction and the original")
    files.add_argument("--image_path", default="images/", help="folder for images (%(default)s)")
    files.add_argument("--table_path", default="tables/", help="folder for tables (%(default)s)")
    files.add_argument(
        "--model_path", default="models/", help="folder with weights MODEL-DATASET.safetensors (%(default)s)"
    )
    files.add_argument("--data_path", help="folder with data sets; by default INVLIB_DATA, or the cache")
    files.add_argument("--name", default="iv", help="goes into the name of the table (%(default)s)")
    parser.set_defaults(program="reconstruct_image")


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Which private images a client has; fields are called as their flags, here and below."""

    dataset: str
    num_images: int
    target_id: int | None
    label_flip: bool
    data_path: str | None

    @property
    def embedded(self) -> bool:
        """Whether an image is taken that comes with invlib."""
        return self.target_id is not None and self.target_id < 0


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Which network is attacked."""

    model: str
    trained_model: bool
    epochs: int | None
    model_path: str


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """How the client trains: ``accumulation`` local steps, where 0 sends a gradient."""

    accumulation: int
    local_lr: float
    batch_size: int
    local_optimizer: str
    local_momentum: float

    def step(self) -> FedSGD | FedAvg:
        """Return what the client computes.

        Raises:
            ConfigError: momentum with Adam.
        """
        if not self.accumulation:
            return FedSGD()
        plain = local_training(self.accumulation, self.local_lr, self.batch_size)
        return replace(plain, optimizer=self.local_optimizer, momentum=self.local_momentum)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """What the server does: the preset that ``--optim`` stands for, why, and the 2020 config, checked."""

    optim: str
    reason: str
    config: Mapping[str, Any]
    soft_labels: bool
    dtype: str
    chunk: int | None
    deterministic: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the attack computes in."""
        return _DTYPES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """What is written."""

    save_image: bool
    image_path: str
    table_path: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of a 2020 command, checked; the seed is drawn where none is given.

    ``program`` is the command's name in 2020, and ``notes`` are lines on what it did otherwise.
    """

    program: str
    notes: tuple[str, ...]
    images: ImageOptions
    network: NetworkOptions
    client: ClientOptions
    attack: AttackOptions
    files: FileOptions
    device: torch.device
    seed: int
    dryrun: bool

    @classmethod
    def parse(cls, args: argparse.Namespace) -> Request:
        """Return what the parsed options of `add_arguments` ask for.

        Raises:
            ConfigError: an option is out of range, or does not go with another.
            DeviceError: there is no such GPU.
        """
        optim, reason, config = _attack(args)
        for flag, choices in (("dataset", NORMALIZATIONS), ("dtype", _DTYPES)):
            if getattr(args, flag) not in choices:
                raise ConfigError(
                    f"--{flag} is {getattr(args, flag)!r}; expected one of {', '.join(choices)}"
                )
        check_ranges(args, _RANGES)
        own = (args.local_optimizer, args.local_momentum) != ("sgd", 0.0)
        if own and (optim != "best" or not args.accumulation):
            raise ConfigError(
                f"--local_optimizer is {args.local_optimizer} and --local_momentum {args.local_momentum}; "
                "expected plain sgd but with --optim best and --accumulation"
            )
        if Path(args.name).name != args.name:
            raise ConfigError(f"--name is {args.name!r}; expected a part of a file's name, without a folder")
        given = vars(args) | {"optim": optim, "reason": reason, "config": checked(config)}

        def part(kind: type[Any]) -> Any:
            return kind(**{field.name: given[field.name] for field in fields(kind)})

        client = part(ClientOptions)
        client.step()
        return cls(
            program=args.program,
            notes=tuple(since2020.notes(args, optim)),
            images=part(ImageOptions),
            network=part(NetworkOptions),
            client=client,
            attack=part(AttackOptions),
            files=part(FileOptions),
            device=device_of(args.device),
            seed=secrets.randbelow(2**32) if args.seed is None else args.seed,
            dryrun=args.dryrun,
        )


def _attack(args: argparse.Namespace) -> tuple[str, str, dict[str, Any]]:
    """Return what --optim stands for, why, and the 2020 config that the options describe."""
    given = {key: getattr(args, flag) for key, flag in _FLAGS.items()}
    for flag, _, _ in since2020.SWITCHES:
        if given[flag] is None and args.program == "reconstruct_image" and getattr(args, f"{flag}_of_2020"):
            given[flag] = False
    ignored = [f"--{_FLAGS[key]}" for key, own in _CHOSEN.items() if given[key] not in (None, own)]
    ignored += ["--soft_labels"] if args.soft_labels else []
    name, reason = args.optim, "as --optim says"
    if name == "best" and ignored:
        raise ConfigError(
            f"--optim best was given {', '.join(ignored)}; expected only --iterations, --restarts "
            "and --tv of the attack's options (it chooses the others by itself)"
        )
    if name == _AUTO and not args.trained_model:
        name, reason = "ours", "the published attack, because the weights are untrained"
        reason += "; --optim best takes this project's strongest"
    elif name == _AUTO and ignored:
        name = "ours"
        reason = f"the published attack, because this project's strongest takes no {', '.join(ignored)}"
    elif name == _AUTO:
        name, reason = "best", "this project's strongest, because the weights are trained"
        reason += "; --optim ours takes the published one"
    preset = PRESETS[name] | since2020.fixed(args.program, name, args.accumulation)
    return name, reason, preset | {key: value for key, value in given.items() if value is not None}
