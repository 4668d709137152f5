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
from invlib.data import text
from invlib.errors import ConfigError
from invlib.models.cards import Trained, save
from invlib.models.training import train, train_text

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
    parser.add_argument(
        "--dataset", required=True, choices=[*NORMALIZATIONS, text.NAME], help="what to train on"
    )
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
    parser.add_argument("--half", action="store_true", help="keep the trained weights in half precision")
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
    shared = {
        name: getattr(args, name) for name in ("strategy", "epochs", "batch_size", "lr", "seed", "resume")
    }
    shared |= {"activation": args.activation, "half": args.half, "device": device}
    if args.dataset == text.NAME:
        if args.no_batch_norm or args.no_augment or args.precision != "float32":
            raise ConfigError(
                f"{text.NAME} is text; expected neither --no-batch-norm nor --no-augment nor --precision"
            )
        sentences = [text.encode(sentence) for sentence in text.sentences()]
        words = len(text.vocabulary())
        trained = train_text(args.model, text.training_text(), sentences, num_classes=words, **shared)
        title, parts = text.TITLE, ("the first nine tenths of each", "sentences from the last tenths")
    else:
        images, labels = data.load(args.dataset, split="train")
        trained = train(
            args.model,
            images,
            labels,
            *data.load(args.dataset, split="test"),
            normalization=NORMALIZATIONS[args.dataset],
            num_classes=len(data.class_names(args.dataset)),
            batch_norm=not args.no_batch_norm,
            augment=not args.no_augment,
            precision=args.precision,
            **shared,
        )
        title, parts = data.describe(args.dataset), ("training images", "test images")
    copy = f" ({args.note})" if args.note else ""
    about = {
        "dataset": args.dataset,
        "data": f"{title}, {parts[0]}{copy}",
        "test_set": f"{title}, {parts[1]}{copy}",
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
        f"--{flag}"
        for flag in ("no-batch-norm", "no-augment", "half")
        if getattr(args, flag.replace("-", "_"))
    ]
    if args.precision != "float32":
        words += ["--precision", args.precision]
    return "python -m invlib train " + shlex.join(str(word) for word in words)
