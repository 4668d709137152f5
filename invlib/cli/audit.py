"""``python -m invlib audit``: an update out of a file, a network and its weights in, a report out."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invlib import models
from invlib.auditing import audit
from invlib.cli.status import INTERRUPTED, SEED, check_ranges
from invlib.core.files import check_writable
from invlib.core.network import unwrapped
from invlib.core.observation import Observation
from invlib.data.files import list_images, read_images
from invlib.errors import ConfigError, DataError
from invlib.federated import load_observation
from invlib.models.weights import fit, locate, read

DESCRIPTION = "Say what one update gives away, by what, why attacks failed, and what would help."
EPILOG = """\
examples:
  python -m invlib audit update.safetensors --model LeNetZhu --weights received.safetensors --out report
  python -m invlib audit audit/round-0001-node-7.safetensors --model mypackage.task:Net --out report
  python -m invlib audit update.safetensors --model mypackage.task:Net --truth private --data similar \\
      --privacy noise_multiplier=1.1,rate=0.01,steps=500 --out report

UPDATE is a file of save_observation, or of a recorder of invlib.integrations. --model is a network of the zoo
(python -m invlib models), in the sizes that the update says, or a function without arguments that makes it,
imported from this folder or from what is installed. The weights are those that the client received, before
its step. Without --weights they are those beside the update, UPDATE.received.safetensors, and where there are
none, those that --model makes; of a network of the zoo they are the untrained ones of --seed.

The folder gets audit.html, one page that needs no network, and audit.json; only their owner can read them. No
picture is in them without --pictures. Ctrl-C ends the audit, and the report says what it had until then.

exit status:
  0, whatever was found; 2 where an option, the update, the network, its weights or images do not fit; 130
  after Ctrl-C.
"""
_RANGES = {"budget": (1, 10**7), "seed": SEED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("update", metavar="UPDATE", type=Path, help="the file of an observation")
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="a network of the zoo, or package.module:function"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the report goes")
    parser.add_argument("--weights", metavar="FILE", help="the weights that the client received")
    parser.add_argument("--truth", type=Path, metavar="FOLDER", help="the client's own images, in its order")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="images that might have been the client's, to tell apart"
    )
    parser.add_argument(
        "--privacy",
        metavar="SETTINGS",
        help="of a training under differential privacy: noise_multiplier=X,rate=X,steps=N",
    )
    parser.add_argument("--budget", type=float, default=240.0, metavar="SECONDS", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    parser.add_argument(
        "--pictures", action="store_true", help="put recovered and private images into the page"
    )


def run(args: argparse.Namespace) -> int:
    """Audit as the command line says, print what is in the first lines of the report, and where it is.

    Raises:
        InvlibError: an option, the update, the network, its weights or images do not fit.
    """
    # all that can be said before the attacks, which take minutes
    check_ranges(args, _RANGES)
    privacy = None if args.privacy is None else _settings(args.privacy)
    for name in ("audit.html", "audit.json"):
        check_writable(args.out / name)
    seen = load_observation(args.update)
    truth = _images("truth", args.truth, seen)
    candidates = _images("data", args.data, seen, scaled=True)
    model, about = _network(args, seen)
    seen.validate(model, text=None)
    print(f"{args.update}: {seen}")
    # At once: the progress bar that follows is written to another stream.
    print(f"{about}; seed {args.seed}, at most about {args.budget:g} s", flush=True)
    report = audit(
        model,
        seen,
        truth,
        budget=args.budget,
        privacy=privacy,
        candidates=candidates,
        seed=args.seed,
        progress=True,
    )
    print(report)  # first of all: a disk may be full
    for path in report.save(args.out, pictures=args.pictures):
        print(path)
    return 0 if report.complete else INTERRUPTED


def _settings(text: str) -> dict[str, float]:
    """Return what ``name=number,name=number`` says; the names are checked by the audit."""
    settings: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            settings[name] = int(value) if value.isdecimal() else float(value)
        except ValueError as error:
            raise ConfigError(
                f"--privacy is {text!r}; expected as noise_multiplier=1.1,rate=0.01,steps=500"
            ) from error
    return settings


def _images(flag: str, folder: Path | None, seen: Observation, *, scaled: bool = False) -> Tensor | None:
    """Return the images of a folder, of the shape of the update's; where it is asked, scaled to it."""
    if folder is None:
        return None
    if seen.is_text:
        raise ConfigError(f"--{flag} is given and the update is of token sequences; expected one of images")
    shape, wanted = seen.image_shape, "×".join(map(str, seen.image_shape))
    if shape[0] not in (1, 3):
        raise ConfigError(f"--{flag} is given and the update's images are {wanted}; expected 1 or 3 channels")
    size = shape[1] if scaled and shape[1] == shape[2] else None
    mode = "RGB" if shape[0] == 3 else "L"
    images, _ = read_images(list_images(folder), size, None, str(folder), mode)
    if shape == (1, 28, 28):
        images = images[..., 2:-2, 2:-2]  # read_images pads those of MNIST
    if tuple(images.shape[1:]) != shape:
        found = "×".join(map(str, images.shape[1:]))
        raise DataError(f"--{flag} {folder} has images of {found}; expected {wanted}, as the update's")
    return images


def _network(args: argparse.Namespace, seen: Observation) -> tuple[nn.Module, str]:
    """Return the network with the weights that the client received, and what it is, in words."""
    beside = args.update.with_suffix(".received.safetensors")
    given: str | Path | None = args.weights or (beside if beside.is_file() else None)
    if ":" in args.model:
        model = _made(args.model)
        if given is not None:
            path = locate(args.model, Path(given))
            fit(model, read(path), f"the weights {str(path)!r}")
    else:
        model = _of_the_zoo(args.model, seen, given, args.seed)
    own = "untrained, as --seed makes it" if ":" not in args.model else "the weights that it makes"
    return model, f"{args.model}, {own if given is None else f'weights {given}'}"


def _of_the_zoo(name: str, seen: Observation, weights: str | Path | None, seed: int) -> nn.Module:
    """Build a network of the zoo for the update's images and classes."""
    shape, lengths = seen.image_shape, [len(value) for value in seen.update.values() if value.ndim]
    sizes: dict[str, Any] = {"num_classes": lengths[-1] if lengths else None}  # the last layer comes last
    if not seen.is_text:
        if shape[1] != shape[2]:
            raise ConfigError(
                f"--model is {name} and the update's images are {'×'.join(map(str, shape))}; expected square "
                "ones, or a function package.module:function that makes the network"
            )
        sizes |= {"in_channels": shape[0], "image_size": shape[1]}
    return models.build(name, **sizes, weights=weights, seed=seed)


def _made(name: str) -> nn.Module:
    """Import a function and let it make the network; torch's global generator stays as it is.

    Raises:
        ConfigError: there is no such function, it raises, or it makes no network.
    """
    module, _, attribute = name.partition(":")
    if not {"", str(Path.cwd())} & {*sys.path}:
        sys.path.insert(0, str(Path.cwd()))  # as python -m has it, and the script invlib has not
    try:
        make: Callable[[], Any] = getattr(importlib.import_module(module), attribute)
        with torch.random.fork_rng(devices=[]):
            model = make()
    except Exception as error:  # what is imported may raise anything
        said = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"--model is {name!r}, which raises {said}; expected a function without arguments that makes the "
            "network, as package.module:function"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model is {name!r}, which makes a {type(model).__name__}; expected an nn.Module")
    return unwrapped(model).eval()
