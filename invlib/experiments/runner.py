"""Run an experiment: every case on every client, a row of the record for each attack."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import math
import os
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, as_completed
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from invlib import metrics
from invlib.core import files
from invlib.core.files import Row
from invlib.core.fingerprint import differences
from invlib.core.version import __version__
from invlib.errors import DataError, WorkerError
from invlib.experiments import plan as _plan
from invlib.experiments import record as _record
from invlib.experiments.cases import Case
from invlib.experiments.networks import Network
from invlib.experiments.plan import Plan, Request, key
from invlib.experiments.record import Record
from invlib.federated import observe
from invlib.metrics import identification
from invlib.metrics.quality import SSIM_SIDE
from invlib.models import cards

_ONE_ATTACK = threading.Lock()  # in each process
_RUNNING = list[Request]()  # that of the attack which holds the lock


def run(
    name: str,
    out: str | os.PathLike[str],
    *,
    executor: Executor | None = None,
    fresh: bool = False,
    pictures: bool = True,
    progress: bool = True,
    **options: Any,
) -> int:
    """Run what the record of an experiment lacks, and return how many attacks that were.

    Args:
        name: of the experiment.
        out: the record; a row is on the disk as soon as its attack has ended.
        executor: runs the attacks, in processes here or elsewhere; None runs them in this process. The rows
            are the same, each once, but in the order in which the attacks end. Each process makes the plan
            anew and has to find the same images, weights and settings; this process alone writes.
        fresh: begin a new record; the old one is kept beside it.
        pictures: keep the originals and what became of them in the record, for the figure; only its owner can
            read a record that is made with them. An image that may not be passed on must not be kept, and no
            exact reconstruction of it either.
        progress: show a progress bar.
        options: as the command has them: images, steps, restarts, reduced, dataset, split, first, only (a
            tuple), seed, weights (a Path) and device (a torch.device).

    Raises:
        InvlibError: an option, the record, data or weights do not fit, here or in another process.
        WorkerError: a process of the executor died, or its scheduler is gone.
        KeyboardInterrupt: after Ctrl-C; the record holds every attack that had ended, and attacks that had
            not begun are cancelled. Whoever made the executor ends its processes.

    Example:
        Four processes on this machine, in a script whose main part is guarded, as multiprocessing needs it::

            from concurrent.futures import ProcessPoolExecutor
            from multiprocessing import get_context

            import invlib as iv

            if __name__ == "__main__":
                with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as executor:
                    iv.experiments.run("table1", "table1.jsonl", executor=executor, images=4)
    """
    request = Request(name=name, **options)
    return carry_out(
        _plan.plan(request), Path(out), executor=executor, fresh=fresh, pictures=pictures, progress=progress
    )


def carry_out(
    plan: Plan,
    path: Path,
    *,
    executor: Executor | None = None,
    fresh: bool = False,
    pictures: bool = True,
    progress: bool = True,
) -> int:
    """Run what the record of a plan lacks, as `run` says, and return how many attacks that were."""
    with ExitStack() as stack:
        record = stack.enter_context(_record.opened(path, fresh=fresh, private=pictures))
        settings = {name: plan.case_settings(case) for name, case in plan.known.items()}
        done = _done(record, plan, settings)
        tasks = [(case, first) for case, first in plan.tasks() if (case.name, first) not in done]
        # Chosen before the first attack: the rows that hold the originals do not depend on which ends first.
        originals = _without_original(record, tasks) if pictures else set()
        bar = stack.enter_context(
            tqdm(
                total=len(done) + len(tasks),
                initial=len(done),
                disable=not progress or not tasks,
                desc=plan.request.name,
                smoothing=0,  # cases differ: what is left takes as long as the mean of all so far
                bar_format="{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}",
            )
        )

        def keep(row: Row) -> None:
            case, first = plan.known[row["case"]], row["image"]
            new = (case.name, first) in originals
            row["truth"] = files.png(_truth(plan, case, first)[0]) if new else None
            row["reconstruction"] = row["reconstruction"] if pictures else None
            record.append(row)
            bar.set_postfix_str(f"after {case.name}", refresh=False)
            bar.update()

        if executor is not None:
            _collect(executor, plan, tasks, settings, keep)
            return len(tasks)
        for case, first in tasks:
            bar.set_postfix_str(f"now {case.name}")
            keep(_attack(plan, case, first, settings[case.name]))
    return len(tasks)


def _collect(
    executor: Executor,
    plan: Plan,
    tasks: list[tuple[Case, int]],
    settings: dict[str, dict[str, Any]],
    keep: Callable[[Row], None],
) -> None:
    """Let an executor run the attacks, and keep the row of each as it ends, whatever ends the whole."""
    images = plan.images_sha256()
    version = hashlib.sha256(files.encode({"images": images, **settings})).hexdigest()
    waiting = list[Future[Row]]()
    try:
        for case, first in tasks:
            expected = (settings[case.name], images)
            waiting.append(executor.submit(work, plan.request, case.name, first, expected, version))
        for future in as_completed(list(waiting)):
            waiting.remove(future)
            keep(future.result())
    except (BrokenExecutor, CancelledError) as error:
        raise WorkerError(
            f"a worker was killed or ran out of memory, or the scheduler is gone ({error}); the record holds "
            "every attack that had ended, and the same command goes on from there"
        ) from error
    finally:
        for future in waiting:
            if not future.cancel() and future.done() and future.exception() is None:
                keep(future.result())


def work(request: Request, case: str, first: int, expected: tuple[dict[str, Any], str], version: str) -> Row:
    """Run one attack in a process of an executor, and return its row.

    Args:
        request: makes the plan, once in each process.
        case: name of the case.
        first: number of the first private image.
        expected: the settings of the case, and the hash of the images, where the run began.
        version: of all settings and images; another one makes the plan anew.

    Raises:
        DataError: this process finds other images, weights or settings.
    """
    with _ONE_ATTACK:  # a worker may have threads, but networks and torch's generator are the process's
        plan, settings, images = _planned(request, version)
        here = settings.get(case, {})
        if files.encode(here) != files.encode(expected[0]):
            raise DataError(
                f"worker {platform.node()} has case {case!r} with {_difference(expected[0], here)}; expected "
                "what the process that began the run has"
            )
        if images != expected[1]:
            raise DataError(
                f"worker {platform.node()} has other images of {plan.settings['dataset']}; expected those of "
                "the process that began the run"
            )
        _RUNNING.append(request)
        try:
            return _attack(plan, plan.known[case], first, expected[0])
        finally:
            _RUNNING.clear()


def stop(request: Request, dask_worker: Any) -> None:
    """End this worker if it is at an attack for a request; its nanny, where it has one, starts it again."""
    if request in _RUNNING and dask_worker.nanny:
        os._exit(1)


@functools.lru_cache(maxsize=1)
def _planned(request: Request, version: str) -> tuple[Plan, dict[str, dict[str, Any]], str]:
    made = _plan.plan(request)
    return made, {name: made.case_settings(c) for name, c in made.known.items()}, made.images_sha256()


def _done(record: Record, plan: Plan, settings: dict[str, dict[str, Any]]) -> set[tuple[str, int]]:
    """Return which attacks the record holds; a record of other settings is an error, not a start."""
    advice = "; expected the same (give another --out, or --fresh to begin anew)"
    wanted = {(case.name, first) for case, first in plan.tasks()}
    done, name = set(), plan.request.name
    for row in map(_plan.current, record.rows):
        where = f"record {record.path} holds {row['case']!r}"
        if row["experiment"] != name:
            raise DataError(f"{where} of experiment {row['experiment']!r}, not of {name!r}{advice}")
        if row["case"] not in plan.known:
            raise DataError(f"{where}, which this form of {name} does not have{advice}")
        now = settings[row["case"]]
        if row["key"] != key(row["case"], row["image"], now):
            raise DataError(f"{where} with {_difference(row['settings'], now)}{advice}")
        if (row["case"], row["image"]) in wanted:
            done.add((row["case"], row["image"]))
            truth = row.get("truth")
            if truth and not _same(truth, _truth(plan, plan.known[row["case"]], row["image"])[0]):
                raise DataError(
                    f"{where} of another image {row['image']} of {now['dataset']} than the one on this disk, "
                    f"which is another copy of the data set{advice}"
                )
    return done


def _difference(was: dict[str, Any], now: dict[str, Any]) -> str:
    was, now = json.loads(files.encode(was)), json.loads(files.encode(now))
    return "; ".join(differences(was, now)) or "settings that do not give its key"


def _same(truth: str, images: Tensor) -> bool:
    # The pixels count, not the file, which other versions of Pillow may pack in another way.
    return torch.equal(files.unpng(truth, len(images)), files.unpng(files.png(images), len(images)))


def _truth(plan: Plan, case: Case, first: int) -> tuple[Tensor, Tensor]:
    return plan.gallery.take(range(first, first + case.images))


def _without_original(record: Record, tasks: list[tuple[Case, int]]) -> set[tuple[str, int]]:
    """Return the first task on each client whose originals the record does not hold."""
    first_on = {(first, case.images): (case.name, first) for case, first in reversed(tasks) if not case.text}
    held = {(row["image"], len(row["psnr"])) for row in record.rows if row.get("truth")}
    return {task for place, task in first_on.items() if place not in held}


def _attack(plan: Plan, case: Case, first: int, settings: dict[str, Any]) -> Row:
    """Let a client take its step, attack what the server sees, and only then look at the truth."""
    started = datetime.datetime.now(datetime.UTC)
    seed = plan.request.seed + first
    device = plan.request.device
    return {
        "experiment": plan.request.name,
        "case": case.name,
        "image": first,
        "place": list(plan.known).index(case.name),
        "key": key(case.name, first, settings),
        "columns": dict(case.columns),
        "paper": case.paper,
        "sweep": case.sweep,
        "series": case.series,
        "settings": settings,
        "seed": seed,
        **(_searched if case.measure is None else _measured)(plan, case, first, seed),
        "started": started.isoformat(timespec="seconds"),
        "commit": cards.commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "invlib": __version__,
    }


def _measured(plan: Plan, case: Case, first: int, seed: int) -> dict[str, Any]:
    """Return what a case measures by itself, beside the floors of its images."""
    assert case.measure is not None
    own = case.measure(plan, case, first, seed)
    places = range(first, first + len(own["psnr"]))
    of_each = {"rank_ssim": None, "rank_features": None, "judge": None}
    return {
        **{
            "ssim": [],
            "score": None,
            "seconds": None,
            "status": "closed_form",
            "evaluations": 0,
            "candidates": 0,
        },
        **{name: [value] * len(places) for name, value in of_each.items()},
        "floors": [_floors(plan, row) for row in places],
        "reconstruction": None,
        **own,
    }


def _searched(plan: Plan, case: Case, first: int, seed: int) -> dict[str, Any]:
    """Return what a search found in one client's update, and what each image of it is worth."""
    began = time.perf_counter()
    truth, labels = _truth(plan, case, first)
    labels = torch.tensor([case.labels.get(label, label) for label in labels.tolist()], device=labels.device)
    shape = (int(truth.shape[1]), int(truth.shape[2]), int(truth.shape[3]))
    net = plan.networks.get(case, seed, shape)
    seen = observe(
        net.model,
        truth,
        labels,
        case.protocol,
        normalization=net.normalization,
        reveal_labels=case.reveal_labels,
        training_mode=case.mode != "evaluation",
    )
    if case.mode.endswith("withheld"):
        seen = replace(seen, buffers={})
    reconstruction = case.attack(net.model, seen, generator=torch.Generator().manual_seed(seed))
    if reconstruction.status == "interrupted":
        raise KeyboardInterrupt
    seconds = time.perf_counter() - began
    images = torch.nan_to_num(reconstruction.images.to(truth), nan=0.5).clamp(0, 1)
    report = metrics.evaluate(replace(reconstruction, images=images), truth, labels)
    images = images[list(report.order)]
    about = [_about(plan, case, images[k], first + k) for k in range(case.images)]
    return {
        "psnr": list(report.psnr),
        "ssim": list(report.ssim),
        "score": reconstruction.score,
        "trial_scores": reconstruction.trial_scores.tolist(),
        "status": reconstruction.status,
        "evaluations": reconstruction.evaluations,
        "seconds": round(seconds, 3),
        "labels_right": report.labels_right,
        "accuracy": net.accuracy,
        **{name: [entry[name] for entry in about] for name in about[0]},
        **({"shares": _shares(case, net, truth, labels)} if case.images > 1 else {}),
        "candidates": len(plan.gallery.candidates(first)[0]),
        "reconstruction": files.png(images),
    }


def _shares(case: Case, net: Network, truth: Tensor, labels: Tensor) -> list[float]:
    """Return how long the update of each image alone is beside that of all, in evaluation mode."""
    parts = [
        observe(net.model, truth[some], labels[some], case.protocol, normalization=net.normalization).update
        for some in (list(range(len(truth))), *([k] for k in range(len(truth))))
    ]
    whole, *own = (math.hypot(*(float(value.double().norm()) for value in part.values())) for part in parts)
    return [length / (len(truth) * whole) if whole else 0.0 for length in own]


def _floors(plan: Plan, row: int) -> dict[str, float | None]:
    candidates, own = plan.gallery.candidates(row)
    return identification.floors(candidates[own], *plan.gallery.others(row))


def _about(plan: Plan, case: Case, image: Tensor, row: int) -> dict[str, Any]:
    """Return what one reconstruction is worth: the floors, and its original's place among the candidates."""
    candidates, own = plan.gallery.candidates(row)
    judge = plan.networks.judge(case, image.shape[0])

    def place(likeness: identification.Likeness) -> int:
        found = identification.identifiability(
            image[None], candidates[own][None], candidates, likeness=likeness
        )
        return found.ranks[0]

    return {
        "floors": _floors(plan, row),
        "rank_ssim": place(identification.by_ssim) if min(image.shape[1:]) >= SSIM_SIDE else None,
        "rank_features": None if judge is None else place(judge.similarity),
        "judge": None if judge is None else judge.name,
    }
