"""``python -m invlib evaluate``: measure a network's accuracy anew and hold it against its model card."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from invlib import data, models
from invlib.core.normalization import NORMALIZATIONS, Normalization
from invlib.core.optional import device_of
from invlib.data import text
from invlib.errors import ConfigError, DataError, UnknownNameError
from invlib.models import cards, training
from invlib.models.decoder import TextDecoder
from invlib.models.weights import locate

TOLERANCE = 0.005  # share of the images: half a percent of them, either way
DESCRIPTION = "Measure the accuracy of trained weights and compare it with what their model card says."
EPILOG = f"""\
examples:
  python -m invlib evaluate ConvNet8-fashion-mnist
  python -m invlib evaluate TextDecoder-austen
  python -m invlib evaluate models/ResNet20-cifar10.safetensors --device cuda

The test images are those of the card's data set, from INVLIB_DATA, the cache or torchvision. The two agree
when they differ by at most {TOLERANCE:.1%} of the images. A card may have been measured on another copy of
the images (it says so): a compressed copy and the original can differ by more.

exit status:
  0 when measured and stated accuracy agree; 1 when they do not; 2 where an option, data or weights do not
  fit; 130 after Ctrl-C.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="a .safetensors file, or shipped weights as MODEL-DATASET"
    )
    parser.add_argument("--dataset", choices=[*NORMALIZATIONS, text.NAME], help="another than the card's")
    parser.add_argument("--split", default="test", choices=["train", "test"], help="(%(default)s)")
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")


def run(args: argparse.Namespace) -> int:
    """Measure, print both numbers and return the exit status.

    Raises:
        InvlibError: weights, card or images are missing or do not fit.
    """
    path, device = find(args.weights), device_of(args.device)
    trained = cards.load(path)
    card = trained.card
    dataset = args.dataset or card.get("dataset")
    model = trained.model.to(device)
    if dataset == text.NAME:
        if not isinstance(model, TextDecoder) or args.split != "test":
            raise ConfigError(
                f"{dataset} has sentences to test a TextDecoder on; expected one, and --split test"
            )
        sentences = [text.encode(sentence) for sentence in text.sentences()]
        measured = training.next_word(model, sentences)["accuracy"]
        title, count = f"next words of {text.TITLE}", len(sentences)
    elif dataset in NORMALIZATIONS:
        images, labels = data.load(dataset, split=args.split)
        print(f"{path.name}: {len(images)} images on {device} …", file=sys.stderr, flush=True)
        normalization = Normalization.from_card(card, NORMALIZATIONS[dataset])
        measured = training.accuracy(model, images, labels, normalization=normalization)
        kind = "training" if args.split == "train" else "test"
        title, count = f"{data.describe(dataset)}, {kind} images", len(images)
    else:
        raise ConfigError(
            f"the card of {path.name} has dataset {dataset!r}; "
            f"expected one of {', '.join([*NORMALIZATIONS, text.NAME])} (give --dataset)"
        )
    print(f"measured: {measured:.4f} on {title}, the {count} on this disk")
    if "accuracy" not in card:
        raise DataError(f"the card of {path.name} states no accuracy; expected one to compare with")
    print(f"card:     {card['accuracy']:.4f} on {card.get('test_set', 'images that it does not name')}")
    if args.split != "test" or (args.dataset is not None and args.dataset != card.get("dataset")):
        print("The card's accuracy is that on its own test images, so the two are not compared.")
        return 0
    difference = measured - card["accuracy"]
    agrees = abs(difference) <= TOLERANCE + 1e-9  # the card may be rounded
    verdict = "they agree" if agrees else "they do NOT agree"
    print(f"{verdict}: {difference:+.4f}, where {TOLERANCE} either way is allowed")
    if "copy" in str(card.get("test_set")):
        print("The card was measured on a copy of the images; on the originals the accuracy may differ.")
    return 0 if agrees else 1


def find(weights: str) -> Path:
    """Return the file of weights by path, or of shipped weights by model and data set.

    Raises:
        UnknownNameError: no shipped weights have that name; the message lists those there are.
        DataError: the file is missing.
    """
    if weights.endswith(".safetensors"):
        return locate("", weights)
    shipped = {
        f"{model}-{slug}": (model, slug) for model, slugs in models.available().items() for slug in slugs
    }
    if weights not in shipped:
        raise UnknownNameError(
            f"no shipped weights {weights!r}; there are: {', '.join(shipped) or 'none'}; "
            "or give the path of a .safetensors file"
        )
    return locate(*shipped[weights])
