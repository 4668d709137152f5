"""``python -m invlib train``: train a network, write its weights and model card."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from invlib import data
from invlib.cli.status import POSITIVE, SEED, check_ranges
from invlib.core.files import check_writable
from invlib.core.normalization import NORMALIZATIONS
from invlib.core.optional import device_of
from invlib.errors import ConfigError
from invlib.models.cards import Trained, save
from invlib.models.training import train

DESCRIPTION = EPILOG = None
_RANGES = {
    "epochs": (1, 10**6),
    "batch_size": (1, 10**7),
    "lr": (POSITIVE, 1e6),
    "seed": SEED,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``python -m invlib train`` understands to a parser."""
    parser.add_argument("--model", required=True, help="name of a network of the zoo")
    parser.add_argument("--dataset", required=True, choices=list(NORMALIZATIONS), help="what to train on")
    parser.add_argument("--strategy", default="conservative", choices=["conservative", "adam"])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument(
        "--out", type=Path, required=True, help="weights, NAME.safetensors; the card goes beside"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, help="another initial learning rate than the strategy's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--activation", help="relu, sigmoid, softplus, gelu ...; default: the network's own")
    parser.add_argument("--no-batch-norm", action="store_true", help="leave batch normalisation out")
    parser.add_argument("--no-augment", action="store_true", help="neither shift nor mirror the images")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--note", help="what a reader of the card must know about the copy of the data")
    parser.add_argument(
        "--resume", type=Path, help="checkpoint file: written every epoch, continued where it exists"
    )


def run(args: argparse.Namespace) -> int:
    """Train as the command line says, write weights and card, and return the exit status.

    Raises:
        InvlibError: as `train`, `save` and `invlib.data.load` do.
    """
    # all that can be said before training, which may take hours
    check_ranges(args, _RANGES)
    device = device_of(args.device)
    if args.out.suffix != ".safetensors":
        raise ConfigError(f"--out is {str(args.out)!r}; expected a name that ends in '.safetensors'")
    for path in (args.out, args.out.with_suffix(".json"), args.resume):
        if path is not None:
            check_writable(path)
    images, labels = data.load(args.dataset, split="train")
    val_images, val_labels = data.load(args.dataset, split="test")
    trained = train(
        args.model,
        images,
        labels,
        val_images,
        val_labels,
        normalization=NORMALIZATIONS[args.dataset],
        strategy=args.strategy,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        num_classes=len(data.class_names(args.dataset)),
        activation=args.activation,
        batch_norm=not args.no_batch_norm,
        augment=not args.no_augment,
        precision=args.precision,
        device=device,
        resume=args.resume,
    )
    copy = f" ({args.note})" if args.note else ""
    title = data.describe(args.dataset)
    about = {
        "dataset": args.dataset,
        "data": f"{title}, training images{copy}",
        "test_set": f"{title}, test images{copy}",
        "command": _command(args),
    }
    card = save(Trained(model=trained.model, card=about | trained.card), args.out)
    print(f"{args.out}: accuracy {trained.card['accuracy']:.4f}; model card {card}", file=sys.stderr)
    return 0


def _command(args: argparse.Namespace) -> str:
    """Return the command that makes the same weights anew; paths of this machine stay out."""
    out = args.out.name if args.out.is_absolute() else args.out.as_posix()
    words = ["--model", args.model, "--dataset", args.dataset, "--strategy", args.strategy]
    words += ["--epochs", args.epochs, "--batch-size", args.batch_size, "--seed", args.seed, "--out", out]
    for flag in ("lr", "activation", "note"):
        if getattr(args, flag) is not None:
            words += [f"--{flag}", getattr(args, flag)]
    words += [
        f"--{flag}" for flag in ("no-batch-norm", "no-augment") if getattr(args, flag.replace("-", "_"))
    ]
    if args.precision != "float32":
        words += ["--precision", args.precision]
    return "python -m invlib train " + shlex.join(str(word) for word in words)
