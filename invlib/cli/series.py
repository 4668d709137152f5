"""Repeat a reconstruction for many private images: ``python -m invlib.rec_mult``.

The command of the code of Geiping et al. 2020, arXiv 2003.14053. Where it does something else than in 2020,
it says so; the page *Coming from the 2020 code* lists every flag.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from invlib.cli import options, reconstruct
from invlib.cli.options import Request
from invlib.cli.session import Session
from invlib.cli.status import INTERRUPTED, check_ranges, exit_status
from invlib.cli.tables import append_row, check_table, column, save_image
from invlib.core.files import check_writable

DESCRIPTION = "Reconstruct the private images of several clients in a row, and say how well that went."
EPILOG = """\
example:
  python -m invlib.rec_mult --model ConvNet16 --num_exp 5 --num_images 2 --accumulation 4 --batch_size 1 \\
    --target_id -1 --iterations 500

what is written:
  RESULT_PATH/HASH/, HASH being that of the settings, gets 0.png, 1.png and so on, table_mul_exp_NAME.csv with
  a row for each client (the columns of reconstruct_image), table_psnrs.csv with its psnr, and
  table_psnr_stats.csv with their mean, standard deviation, maximum, minimum and median. The settings and the
  same numbers go to RESULT_PATH/table_configs.csv, once for each HASH. All are separated by tabs.

exit status:
  0; 2 where an option, data or weights do not fit; 130 after Ctrl-C, which keeps the clients before the one
  that it cuts short. A second run with the same settings does not go on: its rows follow those of the first.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: the arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m invlib.rec_mult", description=DESCRIPTION, epilog=EPILOG)
    add_arguments(parser)
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shared options, and those that only this command has."""
    options.add_arguments(parser)
    group = parser.add_argument_group("the series")
    group.add_argument("--num_exp", type=int, default=10, help="clients in a row (%(default)s)")
    group.add_argument("--unsigned", dest="signed", action="store_false", help="the same as --no_sign")
    group.add_argument("--result_path", default="results/", help="folder for what is found (%(default)s)")
    parser.set_defaults(program="rec_mult", signed=None, target_id=0)


def run(args: argparse.Namespace) -> int:
    """Attack the clients one after another, and return the exit status.

    Raises:
        InvlibError: an option does not fit, or data or weights are missing.
    """
    check_ranges(args, {"num_exp": (1, 10**6)})
    return series(Request.parse(args), clients=args.num_exp, results=Path(args.result_path))


def series(request: Request, *, clients: int, results: Path) -> int:
    """Attack so many clients one after another, and return the exit status."""
    began = time.perf_counter()
    session = Session(request, many=request.images.num_images * clients > 1)
    settings = {
        **request.attack.config,
        "dataset": request.images.dataset,
        "model": request.network.model,
        "num_exp": clients,
        "num_images": request.images.num_images,
        "accumulation": request.client.accumulation,
        "batch_size": request.client.batch_size,
        "local_lr": request.client.local_lr,
        "trained": request.network.trained_model,
        "soft_labels": request.attack.soft_labels,
    }
    if request.client.local_optimizer != "sgd" or request.client.local_momentum:
        settings |= {"client": str(request.client.step())}
    tag = hashlib.md5(json.dumps(settings, sort_keys=True).encode(), usedforsecurity=False).hexdigest()
    folder = results / tag
    table = folder / f"table_mul_exp_{request.files.name}.csv"
    check_table(table, COLUMNS)
    subjects = session.images.subjects(clients)
    if not request.dryrun:
        check_writable(table)
    for note in request.notes:
        print(note)
    if earlier := len(column(table, "psnr")):
        print(f"{table} has {earlier} rows of earlier runs with these settings; those of this run come after")
    psnrs: list[float] = []
    status = 0
    for index, subject in enumerate(subjects):
        reconstruct.announce(session, subject)
        result = session.attack(subject)
        print(result.report)
        if result.reconstruction.status == "interrupted":
            print("interrupted: this client was cut short and is in no table")
            status = INTERRUPTED
            break
        row = {"config_hash": tag, **reconstruct.facts(session, subject, result)}
        psnrs.append(row["psnr"])
        if not request.dryrun:
            for j, image in enumerate(result.images):
                save_image(folder / f"{index * request.images.num_images + j}.png", image)
            append_row(table, {name: row[name] for name in COLUMNS})
            append_row(folder / "table_psnrs.csv", {name: row[name] for name in ("target_id", "psnr")})
    if not psnrs:
        return status
    summary = _summary(psnrs, time.perf_counter() - began)
    print(", ".join(f"{key} {value}" for key, value in summary.items()))
    if request.dryrun:
        print(f"dry run: nothing written to {folder}")
        return status
    append_row(folder / "table_psnr_stats.csv", summary)
    configs = results / "table_configs.csv"
    if status == 0 and tag not in column(configs, "config_hash"):
        append_row(configs, {"config_hash": tag, **settings, **summary})
    print(folder)
    return status


# Those of reconstruct_image but for the time and the names of pictures.
COLUMNS = ("config_hash", *(c for c in reconstruct.COLUMNS if c not in ("timing", "rec_img", "gt_img")))


def _summary(psnrs: list[float], seconds: float) -> dict[str, Any]:
    # A perfect image has an infinite psnr, with which there is no mean.
    finite = [p for p in psnrs if math.isfinite(p)] or [math.nan]
    return {
        "number_of_samples": len(psnrs),
        "timing": str(datetime.timedelta(seconds=round(seconds))),
        "mean": round(statistics.fmean(finite), 3),
        "std": round(statistics.pstdev(finite), 3),
        "max": round(max(finite), 3),
        "min": round(min(finite), 3),
        "median": round(statistics.median(finite), 3),
    }
