"""Run an experiment: every case on every client, a row of the record for each attack."""

from __future__ import annotations

import datetime
import json
import math
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import invlib
from invlib import _trained, metrics
from invlib.errors import DataError
from invlib.experiments import _judge, _record
from invlib.experiments._cases import Case
from invlib.experiments._networks import Network
from invlib.experiments._plan import Plan, key
from invlib.experiments._record import Record, Row
from invlib.federated import observe
from invlib.reconstruction import Reconstruction


def run(
    plan: Plan,
    path: Path,
    *,
    fresh: bool = False,
    pictures: bool = True,
    progress: bool = True,
) -> int:
    """Run what the record lacks, and return how many attacks that were.

    Args:
        plan: what is to be run.
        path: the record.
        fresh: begin a new record; the old one is kept beside it.
        pictures: keep the originals and what became of them in the record, for the figure. An image that may
            not be passed on must not be kept, and no exact reconstruction of it either.
        progress: show a progress bar.

    Raises:
        DataError: the record is locked, broken, or of other settings.
        KeyboardInterrupt: after Ctrl-C; the record holds every attack that had ended.
    """
    with ExitStack() as stack:
        record = stack.enter_context(_record.opened(path, fresh=fresh))
        settings = {name: plan.case_settings(case) for name, case in plan.known.items()}
        done = _done(record, plan, settings)
        tasks = [(case, first) for case, first in plan.tasks() if (case.name, first) not in done]
        bar = stack.enter_context(
            tqdm(
                total=len(done) + len(tasks),
                initial=len(done),
                disable=not progress or not tasks,
                desc=plan.name,
                unit="attack",
                bar_format="{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}",
            )
        )
        clock = _Clock(list(record.rows), [case.name for case, _ in tasks])
        for case, first in tasks:
            bar.set_postfix_str(f"{clock.left()}now {case.name}")
            row = _attack(plan, case, first, settings[case.name])
            new = pictures and not _has_truth(record, row)
            row["truth"] = _judge.png(_truth(plan, case, first)[0]) if new else None
            row["reconstruction"] = row["reconstruction"] if pictures else None
            record.append(row)
            clock.ended(row["case"], row["seconds"])
            bar.update()
    return len(tasks)


def _done(record: Record, plan: Plan, settings: dict[str, dict[str, Any]]) -> set[tuple[str, int]]:
    """Return which attacks the record holds; a record of other settings is an error, not a start."""
    advice = "; expected the same (give another --out, or --fresh to begin anew)"
    wanted = {(case.name, first) for case, first in plan.tasks()}
    done = set()
    for row in record.rows:
        where = f"record {record.path} holds {row['case']!r}"
        if row["experiment"] != plan.name:
            raise DataError(f"{where} of experiment {row['experiment']!r}, not of {plan.name!r}{advice}")
        if row["case"] not in plan.known:
            raise DataError(f"{where}, which this form of {plan.name} does not have{advice}")
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
    was, now = json.loads(_record.encode(was)), json.loads(_record.encode(now))
    parts = [
        f"{name}={was.get(name)!r}, now {now.get(name)!r}"
        for name in {**was, **now}
        if was.get(name) != now.get(name)
    ]
    return "; ".join(parts) or "settings that do not give its key"


def _same(truth: str, images: Tensor) -> bool:
    # The pixels count, not the file, which other versions of Pillow may pack in another way.
    return torch.equal(_judge.unpng(truth, len(images)), _judge.unpng(_judge.png(images), len(images)))


def _truth(plan: Plan, case: Case, first: int) -> tuple[Tensor, Tensor]:
    return plan.gallery.take(range(first, first + case.images))


def _has_truth(record: Record, row: Row) -> bool:
    place = (row["image"], len(row["psnr"]))
    return any(r.get("truth") and (r["image"], len(r["psnr"])) == place for r in record.rows)


def _found(plan: Plan, case: Case, first: int) -> tuple[Network, Tensor, Tensor, Reconstruction]:
    """Let the client take its step, and attack what the server sees.

    Returns:
        The network, the truth with its labels, and what was found.
    """
    truth, labels = _truth(plan, case, first)
    labels = torch.tensor([case.labels.get(label, label) for label in labels.tolist()], device=labels.device)
    seed = plan.seed + first
    shape = (int(truth.shape[1]), int(truth.shape[2]), int(truth.shape[3]))
    net = plan.networks.get(case, seed, shape)
    seen = observe(
        net.model,
        truth,
        labels,
        case.protocol,
        normalization=net.normalization,
        reveal_labels=case.reveal_labels,
    )
    found = case.attack(net.model, seen, generator=torch.Generator().manual_seed(seed))
    if found.status == "interrupted":
        raise KeyboardInterrupt
    return net, truth, labels, found


def _attack(plan: Plan, case: Case, first: int, settings: dict[str, Any]) -> Row:
    """Attack one client, and only then look at the truth."""
    began, started = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    net, truth, labels, found = _found(plan, case, first)
    seconds = time.perf_counter() - began
    images = torch.nan_to_num(found.images.to(truth), nan=0.5).clamp(0, 1)
    report = metrics.evaluate(replace(found, images=images), truth, labels)
    images = images[list(report.order)]
    about = [_about(plan, case, images[k], first + k) for k in range(case.images)]
    return {
        "experiment": plan.name,
        "case": case.name,
        "image": first,
        "place": list(plan.known).index(case.name),
        "key": key(case.name, first, settings),
        "columns": dict(case.columns),
        "paper": case.paper,
        "sweep": case.sweep,
        "series": case.series,
        "settings": settings,
        "seed": plan.seed + first,
        "psnr": list(report.psnr),
        "ssim": list(report.ssim),
        "score": found.score,
        "trial_scores": found.trial_scores.tolist(),
        "status": found.status,
        "evaluations": found.evaluations,
        "seconds": round(seconds, 3),
        "labels_right": report.labels_right,
        "accuracy": net.accuracy,
        **{name: [entry[name] for entry in about] for name in about[0]},
        "candidates": len(plan.gallery.candidates(first)[0]),
        "reconstruction": _judge.png(images),
        "started": started.isoformat(timespec="seconds"),
        "commit": _trained.commit(),
        "device": _device_name(plan.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "invlib": invlib.__version__,
    }


def _about(plan: Plan, case: Case, image: Tensor, row: int) -> dict[str, Any]:
    """Return what one reconstruction is worth: the floors, and its original's place among the candidates."""
    candidates, own = plan.gallery.candidates(row)
    others, same = plan.gallery.others(row)
    judge = plan.networks.judge(case, image.shape[0])
    likeness = _judge.similarity(image, candidates)
    return {
        "floors": _judge.floors(candidates[own], others, same),
        "rank_ssim": None if likeness is None else _judge.rank(likeness, own),
        "rank_features": None if judge is None else _judge.rank(judge.similarity(image, candidates), own),
        "judge": None if judge is None else judge.name,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class _Clock:
    """How long the attacks that are left will take, judged by those of the same case that have ended."""

    def __init__(self, rows: list[Row], waiting: list[str]) -> None:
        self.times: dict[str, list[float]] = {}
        self.waiting = list(waiting)
        for row in rows:
            self.times.setdefault(row["case"], []).append(float(row["seconds"]))

    def ended(self, case: str, seconds: float) -> None:
        self.waiting.remove(case)
        self.times.setdefault(case, []).append(seconds)

    def left(self) -> str:
        known = [t for times in self.times.values() for t in times]
        if not known:
            return ""
        usual = sum(known) / len(known)
        expected = [self.times.get(case, [usual]) for case in self.waiting]
        return f"about {math.ceil(sum(sum(t) / len(t) for t in expected))} s left, "
