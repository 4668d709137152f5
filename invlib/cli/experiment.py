"""``python -m invlib experiment``: options in, a record and a table out."""

from __future__ import annotations

import argparse
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from invlib.cli.status import check_ranges
from invlib.core.files import atomic_write, check_writable
from invlib.core.optional import device_of, package
from invlib.errors import ConfigError
from invlib.experiments import EXPERIMENTS, executors, figure, runner, table
from invlib.experiments import plan as _plan

DESCRIPTION = "Run one of the paper's experiments, or go on with it, and print its table."
EPILOG = """\
examples:
  python -m invlib experiment table1 --images 4 --reduced --figure table1.png
  python -m invlib experiment table1 --full --workers 4
  python -m invlib experiment table1 --full --dask tcp://127.0.0.1:8786

The record gets a row for each attack, on the disk at once: after Ctrl-C or a kill the same command goes on
where it was. A record of other settings is refused, unless --fresh begins a new one. Without --reduced or
--full the form is the full one on a GPU and the reduced one on a CPU. CIFAR10 is taken where it is on this
disk (in INVLIB_DATA or the cache), else the embedded patches.

--workers and --dask share the attacks out; the record has the rows of one process, in the order in which the
attacks end. Under Dask a worker that dies costs nothing: its attack is run again on another. One of --workers
that dies ends the run, and the same command goes on from the record. On GPUs the processes of --workers take
them in turn; more than one GPU is not yet measured.

exit status:
  0; 2 where an option, the record, data or weights do not fit, or a worker died; 130 after Ctrl-C.
"""


_RANGES = {
    "images": (1, 10**6),
    "steps": (1, 10**9),
    "restarts": (1, 10**4),
    "first": (0, 10**9),
    "seed": (0, 2**63),  # an image's number is added
    "workers": (1, 1024),
}


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
        "--only",
        action="append",
        default=[],
        metavar="CASE",
        help="the case of this name, or else cases with these words in theirs",
    )
    what = parser.add_argument_group("on what")
    what.add_argument("--dataset", help="auto, or a name such as CIFAR10, CIFAR100 or patches32")
    what.add_argument("--split", default="train", choices=["train", "test"], help="(%(default)s)")
    what.add_argument("--first", type=int, help="number of the first image (1000 of CIFAR, else 0)")
    what.add_argument("--weights", type=Path, default=Path("models"), metavar="FOLDER", help="(%(default)s)")
    what.add_argument("--seed", type=int, default=0, help="an image's number is added to it (%(default)s)")
    what.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    where = parser.add_argument_group("where").add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, metavar="N", help="in N processes of this machine")
    where.add_argument(
        "--dask", metavar="ADDRESS", help="on the cluster of a Dask scheduler (invlib[cluster])"
    )
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
    begin.add_argument(
        "--fresh", action="store_true", help="begin anew; the old record becomes NAME.old, or NAME.old.2"
    )


def run(args: argparse.Namespace) -> int:
    """Run an experiment as the command line says, print its table and return the exit status.

    Raises:
        InvlibError: an option, the record, data or weights do not fit.
    """
    check_ranges(args, _RANGES)
    if args.figure is not None:
        check_figure(args.figure)
    plan = _plan.plan(_request(args))
    path = args.out or Path("results") / f"{args.name}.jsonl"
    form = "reduced" if plan.request.reduced else "full"
    print(f"{args.name}, {form} form: {len(plan.cases)} cases, {plan.images} clients")
    device = f"device {plan.request.device}"
    if args.workers is not None:
        device += f", {args.workers} workers"
    if args.dask is not None:
        device += f", scheduler {args.dask}"
    # At once: the progress bar that follows is written to another stream.
    print(f"images: {plan.settings['dataset']} ({args.split}) from {plan.first} on; {device}", flush=True)
    with _executor(args, plan.request) as executor:
        made = runner.carry_out(
            plan, path, executor=executor, fresh=args.fresh, pictures=not args.no_pictures
        )
    print(f"{path}: {made} attacks made, {len(plan.tasks()) - made} were there\n")
    print(table(path))
    if args.figure is not None:
        drawn, form = figure(path), args.figure.suffix.removeprefix(".").lower()
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(
            args.figure,
            lambda beside: drawn.savefig(beside, format=form, bbox_inches="tight"),
            private=True,
        )
        print(args.figure)
    return 0


def check_figure(path: Path) -> None:
    """See before the work that a figure can be drawn and written.

    Raises:
        InvlibError: matplotlib is not installed, does not know the suffix, or the file cannot be written.
    """
    package("matplotlib", "viz")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigError(
            f"--figure is {str(path)!r}; expected a name that ends in one of .{', .'.join(known)}"
        )
    check_writable(path)


def _executor(args: argparse.Namespace, request: _plan.Request) -> AbstractContextManager[Executor | None]:
    if args.workers is not None:
        return executors.pool(args.workers, request.device)
    return nullcontext() if args.dask is None else executors.cluster(args.dask, request)


def _request(args: argparse.Namespace) -> _plan.Request:
    same = ("name", "images", "steps", "restarts", "dataset", "split", "first", "seed", "weights")
    return _plan.Request(
        **{name: getattr(args, name) for name in same},
        reduced=True if args.reduced else False if args.full else None,
        only=tuple(args.only),
        device=device_of(args.device),
    )
