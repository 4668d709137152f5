"""Reconstruct the private image of one client: ``python -m invlib.reconstruct_image``.

The command line of the code of Geiping et al. 2020, arXiv 2003.14053, flag for flag.
"""

from __future__ import annotations

import argparse
import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from invlib.cli.options import add_arguments, config_of
from invlib.cli.session import Experiment, Result, Subject
from invlib.cli.status import INTERRUPTED, guarded
from invlib.cli.tables import append_row, check_table, save_image

DESCRIPTION = "Reconstruct the private images of a client from the update that it sends."
EPILOG = """\
example:
  python -m invlib.reconstruct_image --model ResNet20 --dataset CIFAR10 --trained_model --cost_fn sim \\
    --indices def --restarts 32 --save_image --target_id -1

which attack:
  On trained weights this project's strongest attack is taken, for the published one finds next to nothing
  there. It compares directions (--cost_fn sim) of all tensors (--indices def); an option that asks for
  something else brings the published attack back, and so does --optim ours.
  The command above takes about three minutes on one core.

what is written:
  Each run adds a row to TABLE_PATH/table_exp_NAME.csv, separated by tabs: what was asked for, rec_loss (the
  matching cost of the result), psnr in dB and test_mse on images in [0, 1], feat_mse (of the network's
  outputs), the number of the image, the seed, the time taken, the accuracy of trained weights (val_acc) and
  the names of the pictures. With --save_image these are CLASS_MODEL_COST-ID.png, MODEL with "trained" before
  it where it is, and CLASS_ground_truth-ID.png, in IMAGE_PATH.

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
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Attack one client as the options say, and return the exit status.

    Raises:
        InvlibError: an option does not fit, or data or weights are missing.
    """
    config = config_of(args)
    experiment = Experiment(args, config, many=args.num_images > 1)
    subject = experiment.subject(experiment.first)
    table = Path(args.table_path) / f"table_exp_{args.name}.csv"
    check_table(table, COLUMNS)
    announce(experiment, subject)
    result = experiment.attack(subject)
    rec = result.reconstruction
    print(f"matching cost {rec.score:.4g} ({rec.status}, {rec.seconds:.0f} s)")
    print(result.report)
    if args.dryrun:
        print(f"dry run: nothing written to {table}")
        return 0
    pictures: tuple[list[Path], list[Path]] = ([], [])
    if args.save_image:
        pictures = _save_pictures(args, config, subject, result)
        for path in (*pictures[0], *pictures[1]):
            print(path)
    append_row(table, _row(experiment, subject, result, pictures))
    print(table)
    return INTERRUPTED if rec.status == "interrupted" else 0


def announce(experiment: Experiment, subject: Subject) -> None:
    """Say what is attacked with what, before the work begins."""
    args, config = experiment.args, experiment.config
    if experiment.embedded:
        print(f"--target_id {args.target_id}: an image that comes with invlib, not one of {args.dataset}")
    print(f"{subject.about}; labels {subject.labels.tolist()} ({', '.join(subject.classes)})")
    print(f"{experiment.network.about}; seed {experiment.seed}, on {experiment.device}")
    print(f"attack {experiment.optim}: {experiment.why}")
    # At once: the progress bar that follows is written to another stream.
    print(f"{config['restarts']} restarts of {config['max_iterations']} iterations", flush=True)


def facts(experiment: Experiment) -> dict[str, Any]:
    """Return the columns of a table that say what was asked for."""
    args, config = experiment.args, experiment.config
    return {
        "model": args.model,
        "dataset": args.dataset,
        "trained": args.trained_model,
        "accumulation": args.accumulation,
        "restarts": config["restarts"],
        "OPTIM": experiment.optim,
        "cost_fn": config["cost_fn"],
        "indices": config["indices"],
        "weights": config["weights"],
        "scoring": config["scoring_choice"],
        "init": config["init"],
        "tv": config["total_variation"],
    }


def measures(result: Result) -> dict[str, Any]:
    """Return the columns of a table that say how good a reconstruction is."""
    report = result.report
    return {
        "rec_loss": result.reconstruction.score,
        "psnr": report.mean_psnr,
        "test_mse": report.mean_mse,
        "feat_mse": result.feature_mse,
    }


COLUMNS = (
    *("model", "dataset", "trained", "accumulation", "restarts", "OPTIM", "cost_fn", "indices", "weights"),
    *("scoring", "init", "tv", "rec_loss", "psnr", "test_mse", "feat_mse", "target_id", "seed", "timing"),
    *("dtype", "epochs", "val_acc", "rec_img", "gt_img"),
)


def _row(
    experiment: Experiment, subject: Subject, result: Result, pictures: tuple[list[Path], list[Path]]
) -> dict[str, Any]:
    args, card = experiment.args, experiment.network.card
    return {
        **facts(experiment),
        **measures(result),
        "target_id": " ".join(map(str, subject.ids)),
        "seed": experiment.seed,
        "timing": str(datetime.timedelta(seconds=round(result.reconstruction.seconds))),
        "dtype": args.dtype,
        "epochs": card.get("epochs"),
        "val_acc": card.get("accuracy"),
        "rec_img": " ".join(path.name for path in pictures[0]),
        "gt_img": " ".join(path.name for path in pictures[1]),
    }


def _save_pictures(
    args: argparse.Namespace, config: dict[str, Any], subject: Subject, result: Result
) -> tuple[list[Path], list[Path]]:
    folder = Path(args.image_path)
    network = f"{'trained' if args.trained_model else ''}{args.model}_{config['cost_fn']}"
    found, true = [], []
    for j, (kind, number) in enumerate(zip(subject.classes, subject.ids, strict=True)):
        kind = re.sub(r"[^\w.-]+", "-", kind)
        found.append(folder / f"{kind}_{network}-{number}.png")
        true.append(folder / f"{kind}_ground_truth-{number}.png")
        save_image(found[-1], result.images[j])
        save_image(true[-1], subject.images[j])
    return found, true
