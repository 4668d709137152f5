"""Reconstruct the private image of one client: ``python -m invlib.reconstruct_image``.

The command of the code of Geiping et al. 2020, arXiv 2003.14053. Where it does something else than in 2020,
it says so; the page *Coming from the 2020 code* lists every flag.
"""

from __future__ import annotations

import argparse
import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from invlib.cli.options import Request, add_arguments
from invlib.cli.session import Result, Session, Subject
from invlib.cli.status import INTERRUPTED, exit_status
from invlib.cli.tables import append_row, check_table, save_image
from invlib.core.files import check_writable
from invlib.core.reconstruction import in_digits

DESCRIPTION = "Reconstruct the private images of a client from the update that it sends."
EPILOG = """\
example:
  python -m invlib.reconstruct_image --model ResNet20 --dataset CIFAR10 --trained_model --cost_fn sim \\
    --indices def --restarts 32 --save_image --target_id -1

which attack:
  That of 2020, with its defaults (--iterations makes it shorter), and a line for whatever is not as it was.
  On trained weights this project's strongest attack is taken, for the published one finds next to nothing
  there. It compares directions (--cost_fn sim) of all tensors (--indices def); an option that asks for
  something else brings the published attack back, and so does --optim ours.
  The command above takes about four minutes on one core.

what is written:
  Each run adds a row to TABLE_PATH/table_exp_NAME.csv, separated by tabs: what was asked for, rec_loss (the
  matching cost of the result), psnr in dB and test_mse on images in [0, 1] (2020 took normalised ones, not
  clamped), feat_mse (of the network's outputs), the number of the image, the seed, the time taken, the
  accuracy of trained weights (val_acc) and the names of the pictures. With --save_image these are
  CLASS_MODEL_COST-ID.png, MODEL with "trained" before it where it is, and CLASS_ground_truth-ID.png, in
  IMAGE_PATH.

exit status:
  0; 2 where an option, data or weights do not fit; 130 after Ctrl-C, which keeps the best so far.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: the arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m invlib.reconstruct_image", description=DESCRIPTION, epilog=EPILOG
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Attack one client as the options say, and return the exit status.

    Raises:
        InvlibError: an option does not fit, or data or weights are missing.
    """
    request = Request.parse(args)
    session = Session(request, many=request.images.num_images > 1)
    subject = session.images.subject(session.images.first)
    table = Path(request.files.table_path) / f"table_exp_{request.files.name}.csv"
    check_table(table, COLUMNS)
    if not request.dryrun:
        check_writable(table)
        if request.files.save_image:
            check_writable(Path(request.files.image_path) / "picture.png")
    for note in request.notes:
        print(note)
    announce(session, subject)
    result = session.attack(subject)
    reconstruction = result.reconstruction
    cost, seconds = in_digits(reconstruction.score), f"{reconstruction.seconds:.0f} s"
    print(f"matching cost {cost} ({reconstruction.status}, {seconds})")
    print(result.report)
    if request.dryrun:
        print(f"dry run: nothing written to {table}")
        return 0
    row = facts(session, subject, result)
    try:
        if request.files.save_image:
            row |= _save_pictures(Path(request.files.image_path), row, subject, result)
    finally:  # the row is kept where its pictures cannot be
        append_row(table, {name: row[name] for name in COLUMNS})
    print(f"{table} (psnr and test_mse of images in [0, 1]; in 2020 of normalised ones, not clamped)")
    return INTERRUPTED if reconstruction.status == "interrupted" else 0


def announce(session: Session, subject: Subject) -> None:
    """Say what is attacked with what, before the work begins."""
    request, attack = session.request, session.request.attack
    print(f"{subject.about}; labels {subject.labels.tolist()} ({', '.join(subject.classes)})")
    print(f"{session.network.about}; seed {request.seed}, on {request.device}")
    print(f"attack {attack.optim}: {attack.reason}")
    # At once: the progress bar that follows is written to another stream.
    print(f"{attack.config['restarts']} restarts of {attack.config['max_iterations']} iterations", flush=True)


def facts(session: Session, subject: Subject, result: Result) -> dict[str, Any]:
    """Return the columns of a table: what was asked for, and how good a reconstruction is."""
    request, config, card = session.request, session.request.attack.config, session.network.card
    return {
        "model": request.network.model,
        "dataset": request.images.dataset,
        "trained": request.network.trained_model,
        "accumulation": request.client.accumulation,
        "restarts": config["restarts"],
        "OPTIM": request.attack.optim,
        "cost_fn": config["cost_fn"],
        "indices": config["indices"],
        "weights": config["weights"],
        "scoring": config["scoring_choice"],
        "init": config["init"],
        "tv": config["total_variation"],
        "rec_loss": result.reconstruction.score,
        "psnr": result.report.mean_psnr,
        "test_mse": result.report.mean_mse,
        "feat_mse": result.feature_mse,
        "target_id": " ".join(map(str, subject.ids)),
        "seed": request.seed,
        "timing": str(datetime.timedelta(seconds=round(result.reconstruction.seconds))),
        "dtype": request.attack.dtype,
        "epochs": card.get("epochs"),
        "val_acc": card.get("accuracy"),
        "rec_img": "",
        "gt_img": "",
    }


COLUMNS = (
    *("model", "dataset", "trained", "accumulation", "restarts", "OPTIM", "cost_fn", "indices", "weights"),
    *("scoring", "init", "tv", "rec_loss", "psnr", "test_mse", "feat_mse", "target_id", "seed", "timing"),
    *("dtype", "epochs", "val_acc", "rec_img", "gt_img"),
)


def _save_pictures(folder: Path, row: dict[str, Any], subject: Subject, result: Result) -> dict[str, str]:
    """Save reconstructions and originals, and return the columns that name them."""
    network = f"{'trained' if row['trained'] else ''}{row['model']}_{row['cost_fn']}"
    kinds = [re.sub(r"[^\w.-]+", "-", kind) for kind in subject.classes]
    columns = {}
    for column, infix, images in (
        ("rec_img", network, result.images),
        ("gt_img", "ground_truth", subject.images),
    ):
        names = [f"{kind}_{infix}-{number}.png" for kind, number in zip(kinds, subject.ids, strict=True)]
        for name, image in zip(names, images, strict=True):
            save_image(folder / name, image)
            print(folder / name)
        columns[column] = " ".join(names)
    return columns
