"""The attacks of a report: each that applies, the cheapest first, and what its score means here."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.auto import best
from invlib.attacks.base import loss_of
from invlib.attacks.exact import exact_batch
from invlib.attacks.patches import patch_embedding
from invlib.attacks.tokens import token_embedding
from invlib.attacks.verified import distance_of
from invlib.auditing.words import NOT_FOUND, Finding, Number, Verdict
from invlib.core.observation import Observation
from invlib.core.reconstruction import Reconstruction, in_digits
from invlib.data import samples
from invlib.errors import ConfigError, DoubtWarning, InvlibError, RecoveryError
from invlib.metrics import evaluate, identifiability
from invlib.metrics.identification import by_pixels, by_ssim, floors
from invlib.metrics.quality import SSIM_SIDE, originals

LIKELY = 0.1  # of the least distance of noise and photographs: below, a picture is taken for the right one
_OWN = 2**31  # added to the seed: private images of a test are often noise of a small one
_WRONG = 16  # pictures of each kind that are known to be wrong
_EVALUATIONS = (20, 1200)  # of one search, the fewest and the most
_BACKWARD = 3.0  # times an evaluation of the client's step: with its derivative, and what the search does
_LIKE = 1e-2  # 20 dB, below which a candidate may be the image that was recovered
_COPY = 1e-3  # mean squared difference, 30 dB, below which a candidate is a copy of the true image
_FEATURES = 1000  # evaluations of the searches for the images of recovered features
_EXACT_SHARE = 0.4  # of the time left, for the search of whole batches


@dataclass(frozen=True, kw_only=True, eq=False)
class Tried:
    """One attack that was tried.

    Args:
        finding: what the report says of it.
        attack: the attack, with its settings.
        reconstruction: what it gave; None where it does not apply.
        wrong: the least distance of pictures that are known to be wrong.
        distance: that of the attack's own pictures; both are NaN where it was not measured.
        stopped: whether somebody stopped it (Ctrl-C), and not the end of its time.
    """

    finding: Finding
    attack: Any
    reconstruction: Reconstruction | None = None
    wrong: float = float("nan")
    distance: float = float("nan")
    stopped: bool = False

    @property
    def evaluations(self) -> int:
        """How many evaluations its search was allowed; 0 where it needed none."""
        searched = self.reconstruction is not None and self.reconstruction.status != "closed_form"
        return getattr(self.attack, "evaluations", 0) if searched else 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What is attacked, and by what an attack is judged.

    Args:
        model: the network that the client received.
        observation: what the server saw of the client.
        truth: the private images ``(N, C, H, W)`` in [0, 1], or token sequences ``(N, T)``; None is unknown.
        candidates: images that might have been the private ones, among which they are to be identified.
        truth_is: what the truth is called.
        seeds: of searches, that many.
        seed: of all that is drawn.
        evaluations: of each search; None takes as many as its time allows.
        progress: whether attacks show a bar.
    """

    model: nn.Module
    observation: Observation
    truth: Tensor | None
    candidates: Tensor
    truth_is: str = "the truth"
    seeds: int = 2
    seed: int = 0
    evaluations: int | None = None
    progress: bool = False


def candidates_like(observation: Observation) -> Tensor:
    """Return photographs ``(M, C, H, W)`` in [0, 1] of the shape of the private images."""
    channels, *sides = observation.image_shape
    photographs, _ = samples("patches32")
    if channels == 1:
        photographs = photographs.mean(1, keepdim=True)
    elif channels != photographs.shape[1]:
        photographs = photographs.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if list(photographs.shape[2:]) != sides:
        photographs = F.interpolate(photographs, size=sides, mode="bilinear", antialias=True)
    return photographs.clamp(0, 1)


def attempts(subject: Subject, until: float) -> Iterator[Tried]:
    """Attack until a time of `time.perf_counter`, and yield what each attack gave.

    It ends where one attack has proved all that there is.

    Raises:
        KeyboardInterrupt: somebody stopped an attack; what it had is yielded before.
    """
    observation = subject.observation
    if observation.is_text:
        yield from _unless_stopped(_ran(subject, "Token and position tables", token_embedding(), until))
        return
    began = time.perf_counter()
    each = _seconds_each(subject)
    seconds = max(1.0, _EXACT_SHARE * (until - began))
    batch = exact_batch(seconds=seconds)
    if _FEATURES * each > seconds:
        batch = exact_batch(seconds=seconds, search=None)
    for name, attack in (("Whole batch, exactly", batch), ("Patch embedding", patch_embedding())):
        tried = _ran(subject, name, attack, until)
        yield from _unless_stopped(tried)
        if tried.finding.verdict == "recovered and certified":
            return
    for k in range(subject.seeds):
        left = until - time.perf_counter()
        evaluations = subject.evaluations or _within(left / (subject.seeds - k) / each)
        if k and left < (time.perf_counter() - began) / 2:
            return
        tried = _ran(subject, f"Search, seed {subject.seed + k}", best(evaluations=evaluations), until, k)
        yield from _unless_stopped(tried)
        # A closed form and an update of zero are the same with any seed.
        if tried.reconstruction is None or tried.reconstruction.status == "closed_form":
            return


def _unless_stopped(tried: Tried) -> Iterator[Tried]:
    yield tried
    if tried.stopped:
        raise KeyboardInterrupt


def counted(attacks: list[Tried]) -> list[Tried]:
    """Leave out all searches but the one that an attacker would keep, whose pictures explain the update best.

    Of several seeds the truth must not choose.
    """
    searches = [tried for tried in attacks if tried.evaluations and not math.isnan(tried.distance)]
    kept = min(searches, key=lambda tried: tried.distance, default=None)
    return [tried for tried in attacks if tried not in searches or tried is kept]


def _within(evaluations: float) -> int:
    fewest, most = _EVALUATIONS
    return int(min(max(evaluations, fewest), most))


def _seconds_each(subject: Subject) -> float:
    """Return how long an evaluation of a search takes, measured on one of the client's step."""
    observation = subject.observation
    images = subject.candidates[:1].expand(observation.num_images, -1, -1, -1)
    labels = observation.labels
    labels = torch.zeros(observation.num_images, dtype=torch.int64) if labels is None else labels
    distance = _distance(subject)
    try:
        distance(images, labels)  # the first call of a process loads and compiles what the others have
        began = time.perf_counter()
        distance(images, labels)
    except (InvlibError, RuntimeError, ValueError, IndexError):  # of a loss that takes other targets
        return 1.0
    return max(1e-4, _BACKWARD * (time.perf_counter() - began))


def _distance(subject: Subject) -> Callable[[Tensor, Tensor], float]:
    return distance_of(subject.model, subject.observation, loss_of(F.cross_entropy, subject.observation))


def _ran(subject: Subject, name: str, attack: Any, until: float, k: int = 0) -> Tried:
    """Run one attack, until it ends or its time does, and judge what it gave."""
    generator = torch.Generator().manual_seed(subject.seed + k)

    def late(_: object) -> bool:
        return time.perf_counter() > until

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DoubtWarning)  # a result has them too
            result = attack(
                subject.model,
                subject.observation,
                generator=generator,
                callback=late,
                progress=subject.progress,
            )
    except RecoveryError as error:
        why = str(error)
        finding = Finding(
            name=name, kind="found by an attack", verdict="not tried", text=f"Does not apply: {why}."
        )
        return Tried(finding=finding, attack=attack)
    stopped = result.status == "interrupted" and time.perf_counter() <= until
    return replace(_judged(subject, name, attack, result), stopped=stopped)


def _judged(subject: Subject, name: str, attack: Any, result: Reconstruction) -> Tried:
    """Say what a result is worth: by its certificate, by the truth, else by what wrong pictures score."""
    count = subject.observation.num_images
    proved = 0 if result.certified is None else int(result.certified.sum())
    numbers: dict[str, Number] = {
        "score": result.score,
        "compared by": result.objective,
        "evaluations": result.evaluations,
        "seconds": round(result.seconds, 2),
        "status": result.status,
        "seed": subject.seed,
        "images": len(result.tokens) if result.tokens is not None else len(result.images),
        "certified": proved,
        "note": result.note,
        "doubts": list(result.warnings),
    }
    said = []
    if result.expected_psnr is not None:
        numbers["expected PSNR in dB"] = [round(float(value), 1) for value in result.expected_psnr]
    if result.tokens is not None:
        return _of_text(subject, name, attack, result, numbers)
    wrong = distance = float("nan")
    verdict: Verdict = NOT_FOUND
    if len(result.images) == count and result.labels is not None:
        distance, pictures = wrong_pictures(subject, result)
        wrong = min(pictures["noise"], pictures["photographs"])
        numbers |= {"distance of its pictures": distance}
        numbers |= {f"least distance of {kind}": least for kind, least in pictures.items()}
        if result.status == "closed_form" and not proved and distance <= 1e-6 * pictures["noise"]:
            proved = count  # the client's own step on these images is what was observed
            numbers["certified"] = proved
        said.append(
            f"The update of its pictures is {in_digits(distance)} from the observed one; that of noise is at "
            f"least {in_digits(pictures['noise'])} from it, of photographs "
            f"{in_digits(pictures['photographs'])}, of shifted copies of these "
            f"{in_digits(pictures['shifted copies'])} ({_WRONG} of each)"
        )
        likely = nearer_than_wrong(subject.observation, distance, wrong)
        if likely and distance < pictures["shifted copies"]:
            verdict = "probably recovered"
    if subject.truth is not None and len(result.images):
        verdict, of_truth = _beside(subject.truth, subject, result, numbers)
        said.append(of_truth)
    if proved == count:
        verdict = "recovered and certified"
    elif proved:
        verdict = "partly"
    if proved:
        said.insert(0, f"{proved} of {count} images are proved to be the client's, without seeing them")
    text = ". ".join(said or [f"It gave {len(result.images)} of {count} images"]) + "."
    finding = Finding(
        name=name,
        kind="found by an attack",
        verdict=verdict,
        text=text,
        numbers=numbers,
        certified=proved > 0,
        advice="Look at the doubts among the numbers." if result.warnings else "",
    )
    return Tried(finding=finding, attack=attack, reconstruction=result, wrong=wrong, distance=distance)


def nearer_than_wrong(observation: Observation, distance: float, wrong: float) -> bool:
    """Say whether a distance is one that wrong pictures do not reach.

    Under noise the true images' own distance is about half the number of numbers that were sent, give or take
    the root of that: what is above it counts, and the wrong pictures' has to stand out.
    """
    own = 0.0
    if float(getattr(observation.protocol, "noise", 0) or 0):
        own = sum(value.numel() for value in observation.update.values()) / 2
    return distance - own < LIKELY * (wrong - own) and wrong - own > 3 * math.sqrt(own)


def wrong_pictures(subject: Subject, result: Reconstruction) -> tuple[float, dict[str, float]]:
    """Return how far a result's update is from the observed one, and the least that wrong pictures reach.

    They are noise, photographs, and copies of the result shifted by a few pixels, with the result's labels:
    what a search that found nothing would end near, on this very network and update.

    Returns:
        The distance of the result's images; and kind → the least distance among its pictures.
    """
    assert result.labels is not None
    distance, labels = _distance(subject), result.labels
    generator = torch.Generator().manual_seed(subject.seed + _OWN)
    count, images = len(result.images), result.images
    noise = [torch.rand(images.shape, generator=generator) for _ in range(_WRONG)]
    # A candidate that is like the result may be the private image itself, and is not known to be wrong.
    others = subject.candidates[_unlike(subject.candidates, images, _LIKE)]
    others = others if len(others) else subject.candidates
    draws = [torch.randint(len(others), (count,), generator=generator).tolist() for _ in range(_WRONG)]
    photographs = [others[draw].to(images) for draw in draws]
    side = max(1, min(images.shape[2:]) // 8)
    moves = torch.randint(1, side + 1, (_WRONG, 2), generator=generator).tolist()
    shifted = [images.roll((down, -right), (2, 3)) for down, right in moves]
    kinds = {"noise": noise, "photographs": photographs, "shifted copies": shifted}
    least = {kind: min(distance(picture, labels) for picture in pictures) for kind, pictures in kinds.items()}
    return distance(images, labels), least


def _beside(
    truth: Tensor, subject: Subject, result: Reconstruction, numbers: dict[str, Number]
) -> tuple[Verdict, str]:
    """Compare a result with the truth, beside floors, and say whether it identifies it."""
    report = evaluate(result, truth)
    found = torch.tensor([place >= 0 for place in report.order])
    others = subject.candidates[_unlike(subject.candidates, truth)]
    others = others if len(others) else candidates_like(subject.observation)
    likeness = by_ssim if min(truth.shape[2:]) >= SSIM_SIDE else by_pixels
    identified = identifiability(report.images, truth[found], others, likeness=likeness)
    low, high = identified.interval
    least = [floors(image, others.to(image), image[:0]) for image in truth]
    numbers |= {
        "PSNR in dB": [round(value, 2) for value in report.psnr],
        "SSIM": [round(value, 3) for value in report.ssim],
        "floor, the best grey, in dB": [round(float(floor["grey"] or 0), 2) for floor in least],
        "floor, the mean of the candidates, in dB": [round(float(floor["mean"] or 0), 2) for floor in least],
        "identified": identified.hits,
        "candidates": identified.candidates,
        "95 % interval of the share": [round(low, 3), round(high, 3)],
    }
    text = (
        f"Beside {subject.truth_is}: mean PSNR {report.mean_psnr:.1f} dB (best grey image "
        f"{sum(float(f['grey'] or 0) for f in least) / len(least):.1f} dB), {identified}"
    )
    if identified.hits == len(truth):
        return "identified", text
    return ("partly" if identified.hits else NOT_FOUND), text


def _unlike(candidates: Tensor, images: Tensor, error: float = _COPY) -> Tensor:
    """Return which candidates are no copies of an image, scaled or compressed in another way."""
    gaps = (candidates[:, None] - images.to(candidates)[None]).square().flatten(2).mean(2)
    return gaps.amin(1) > error


def _of_text(
    subject: Subject, name: str, attack: Any, result: Reconstruction, numbers: dict[str, Number]
) -> Tried:
    tokens = result.tokens
    assert tokens is not None
    known, proved = int((tokens >= 0).sum()), result.certified is not None and bool(result.certified.all())
    numbers |= {"tokens": tokens.numel(), "tokens known": known}
    verdict: Verdict = "recovered and certified" if proved else "partly" if known else NOT_FOUND
    text = f"{known} of {tokens.numel()} tokens are known with their place"
    if subject.truth is not None:
        right = int((tokens.to(subject.truth) == subject.truth).sum())
        numbers["tokens right"] = right
        text += f", {right} of them right"
        verdict = "identified" if right == tokens.numel() and not proved else verdict
    finding = Finding(
        name=name,
        kind="found by an attack",
        verdict=verdict,
        text=f"{text}.",
        numbers=numbers,
        certified=proved,
    )
    return Tried(finding=finding, attack=attack, reconstruction=result)


def checked_truth(truth: Any, observation: Observation) -> tuple[Tensor | None, Tensor | None]:
    """Return the truth as a tensor of the observation's images, and its labels where they were given.

    Raises:
        ConfigError: its shape is another one.
    """
    if truth is None:
        return None, None
    truth, labels = truth if isinstance(truth, tuple) else (truth, observation.labels)
    known: Tensor = torch.as_tensor(truth)
    wanted = (observation.num_images, *observation.image_shape)
    if tuple(known.shape) != wanted:
        raise ConfigError(f"truth has shape {tuple(known.shape)}; expected {wanted}, as the observation says")
    if labels is not None:
        labels = replace(observation, labels=labels).labels  # which checks them
    return (known if observation.is_text else originals(known)), labels
