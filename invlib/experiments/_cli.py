"""``python -m invlib experiment``: options in, a record and a table out."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from invlib._experiment import _device
from invlib.errors import DataError
from invlib.experiments import EXPERIMENTS, _plan, _run, figure, get, table
from invlib.experiments._plan import Plan

DESCRIPTION = "Run one of the paper's experiments, or go on with it, and print its table."
EPILOG = """\
examples:
  python -m invlib experiment table1 --images 4 --reduced --figure table1.png

The record gets a row for each attack, on the disk at once: after Ctrl-C or a kill the same command goes on
where it was. A record of other settings is refused, unless --fresh begins a new one. Without --reduced or
--full the form is the full one on a GPU and the reduced one on a CPU. CIFAR10 is taken where it is on this
disk (in INVLIB_DATA or the cache), else the embedded patches.

exit status:
  0; 2 where an option, the record, data or weights do not fit; 130 after Ctrl-C.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(EXPERIMENTS)}")
    size = parser.add_argument_group("how much")
    form = size.add_mutually_exclusive_group()
    form.add_argument("--reduced", action="store_true", help="smaller networks and budgets, for a CPU")
    form.add_argument("--full", action="store_true", help="as large as the paper's, for a GPU")
    size.add_argument("--images", type=int, help="clients attacked in each case")
    size.add_argument("--steps", type=int, help="network evaluations of each restart")
    size.add_argument("--restarts", type=int)
    size.add_argument(
        "--only", action="append", default=[], metavar="CASE", help="cases with these words in their name"
    )
    what = parser.add_argument_group("on what")
    what.add_argument("--dataset", help="auto, or a name such as CIFAR10, CIFAR100 or patches32")
    what.add_argument("--split", default="train", choices=["train", "test"], help="(%(default)s)")
    what.add_argument("--first", type=int, help="number of the first image (1000 of CIFAR, else 0)")
    what.add_argument("--weights", type=Path, default=Path("models"), metavar="FOLDER", help="(%(default)s)")
    what.add_argument("--seed", type=int, default=0, help="an image's number is added to it (%(default)s)")
    what.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    files = parser.add_argument_group("the record")
    files.add_argument("--out", type=Path, help="default: results/NAME.jsonl")
    files.add_argument("--figure", type=Path, metavar="FILE", help="draw the record too, as .png or .svg")
    files.add_argument(
        "--no-pictures",
        action="store_true",
        help="keep numbers alone, where the images or exact copies of them may not be passed on",
    )
    begin = files.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="go on where the record ends (the default)")
    begin.add_argument("--fresh", action="store_true", help="begin anew; the old record becomes NAME.old")


def cli(args: argparse.Namespace) -> int:
    """Run an experiment as the command line says, print its table and return the exit status.

    Raises:
        InvlibError: an option, the record, data or weights do not fit.
    """
    plan = _planned(args)
    path = args.out or Path("results") / f"{args.name}.jsonl"
    form = "reduced" if _reduced(args, plan.device) else "full"
    print(f"{args.name}, {form} form: {len(plan.cases)} cases, {plan.images} clients")
    # At once: the progress bar that follows is written to another stream.
    print(
        f"images: {plan.settings['dataset']} ({args.split}) from {plan.first} on; device {plan.device}",
        flush=True,
    )
    made = _run.run(plan, path, fresh=args.fresh, pictures=not args.no_pictures)
    print(f"{path}: {made} attacks made, {len(plan.tasks()) - made} were there\n")
    print(table(path))
    if args.figure is not None:
        try:
            figure(path).savefig(args.figure, bbox_inches="tight")
        except (OSError, ValueError) as error:  # no such folder; no such format
            raise DataError(f"{args.figure} cannot be written: {error}") from error
        print(args.figure)
    return 0


def _planned(args: argparse.Namespace) -> Plan:
    experiment, device = get(args.name), _device(args.device)
    return _plan.plan(
        args.name,
        experiment,
        images=args.images,
        device=device,
        steps=args.steps,
        restarts=args.restarts,
        reduced=_reduced(args, device),
        dataset=args.dataset,
        split=args.split,
        first=args.first,
        only=args.only,
        seed=args.seed,
        weights=args.weights,
    )


def _reduced(args: argparse.Namespace, device: torch.device) -> bool:
    return bool(args.reduced or (device.type == "cpu" and not args.full))
