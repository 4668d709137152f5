"""The audit of one update: its parts, in their order, within a budget."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from invlib.auditing.leaks import leaks
from invlib.auditing.protections import bounds, diagnostics, helps, stated
from invlib.auditing.report import AuditReport
from invlib.auditing.tried import Subject, Tried, attempts, candidates_like, checked_truth, counted
from invlib.auditing.why import why
from invlib.auditing.words import NOT_FOUND, RANKING, Finding, Number, Verdict, worst
from invlib.core.network import trainable_parameters
from invlib.core.observation import Observation, words_of
from invlib.core.version import __version__
from invlib.errors import ConfigError
from invlib.metrics.quality import unit_images
from invlib.settings import Count, FromZero, Positive, checked, checks

# Leaks about the client's data; the others are about its update.
_OF_THE_DATA = (
    *("Labels", "Batch size", "Local steps", "Batch statistics", "Tokens", "Longest sequence"),
    "Exactly readable layers",
)
_ATTACKS, _DEFENCES = 0.55, 0.95  # of the budget, when these parts end
_NEVER = (
    "a server that changes the model before it sends it (threat models F to H): see invlib.presend",
    "several updates of the same client together, and updates of other clients in its round",
    "attackers with a generative model of the client's kind of images",
    "inference that recovers nothing: membership, properties of the data set",
)


@checks
def audit(
    model: nn.Module,
    observation: Observation,
    truth: Any = None,
    *,
    budget: Positive = 240.0,
    privacy: Any = None,
    candidates: Any = None,
    evaluations: Count | None = None,
    seed: FromZero = 0,
    progress: bool = False,
) -> AuditReport:
    """Say what one update gives away, by what, why attacks failed, and what would help.

    What the update tells by itself comes first. Then four kinds of statement are kept apart: what an attack
    found, a lower bound on the risk; what cannot be told apart; what is bounded for everybody; local
    diagnostics, which bound nothing. Without the truth a picture counts as probably right where its update
    is nearer to the observed one than a tenth of the distance of noise and of other photographs on the same
    network, and nearer than its own shifted copies; as proved where an attack certifies it. Of several
    seeds the one counts whose pictures explain the update best, as an attacker would choose.

    Args:
        model: the network that the client received.
        observation: what the server saw, captured or simulated.
        truth: the private images ``(N, C, H, W)`` in [0, 1], or tokens ``(N, T)``, where they are known; or
            a pair of them and their labels. It is seen by what compares and explains, and by no attack.
        budget: seconds. A step of an attack that has begun ends; all parts have their share of it.
        privacy: what is stated of a training under differential privacy: a mapping with
            ``noise_multiplier``, ``rate`` and ``steps``, or what `invlib.integrations.opacus.privacy_of`
            returns.
        candidates: images ``(M, C, H, W)`` in [0, 1] that might have been the private ones, among which
            results have to identify them; None takes photographs that come with invlib.
        evaluations: of each search, within the budget. None takes as many as there is time for, which are
            not the same on each run.
        seed: of all that is drawn.
        progress: whether attacks show a bar.

    Returns:
        The report. Ctrl-C ends the audit, and the report says what it had until then.

    Raises:
        ObservationError: the update does not fit the model.
        ConfigError: a setting, the truth, the candidates or ``privacy`` is none that can be used.

    Example:
        >>> import torch, invlib as iv
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
        >>> images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        >>> seen = iv.observe(model, images, torch.tensor([3]), iv.FedSGD(), normalization=iv.UNIT)
        >>> iv.audit(model, seen, budget=5).verdict
        'recovered and certified'
    """
    began = time.perf_counter()
    checked("observation", observation, Observation)
    model = observation.validate(model, text=None)
    (truth, labels), privacy = checked_truth(truth, observation), stated(privacy)
    subject = Subject(
        model=model,
        observation=observation,
        truth=truth,
        candidates=_candidates(candidates, observation),
        seed=seed,
        evaluations=evaluations,
        progress=progress,
    )
    found: list[Finding] = []
    attacks: list[Tried] = []
    reasons: list[Finding] = []
    defences: list[Finding] = []
    complete = True
    try:
        found += leaks(model, observation)
        for tried in attempts(subject, began + _ATTACKS * budget):
            attacks.append(tried)
        if worst([tried.finding for tried in counted(attacks)]) not in RANKING[:3]:
            known = (truth, labels) if truth is not None and labels is not None else truth
            reasons += why(model, observation, attacks, known)
        leading = _leading(attacks)
        for part in _protected(subject, privacy, leading, began + _DEFENCES * budget):
            defences.append(part)
    except KeyboardInterrupt:
        complete = False
    verdict = worst([*(tried.finding for tried in counted(attacks)), *reasons, *found])
    scope = _scope(subject, budget) | {"seconds": round(time.perf_counter() - began, 1)}
    return AuditReport(
        verdict=verdict,
        summary=(_sentence(verdict, subject, attacks, reasons + found), _told(found), _helped(defences)),
        scope=scope,
        leaks=tuple(found),
        attacks=tuple(tried.finding for tried in attacks),
        reasons=tuple(reasons),
        defences=tuple(defences),
        not_tried=_NEVER,
        complete=complete,
        pictures=_pictures(subject, _leading(attacks)),
    )


def _protected(subject: Subject, privacy: Any, leading: Tried | None, until: float) -> Iterable[Finding]:
    yield from bounds(subject, privacy)
    result = None if leading is None else leading.reconstruction
    if result is not None:
        reference = subject.truth if subject.truth is not None else result.images
        labels = subject.observation.labels if subject.observation.labels is not None else result.labels
        yield from diagnostics(subject, reference, labels)
    if leading is not None:
        yield from helps(subject, leading, until)


def _candidates(given: Any, observation: Observation) -> Tensor:
    if observation.is_text:
        return torch.empty(0)
    if given is None:
        return candidates_like(observation)
    images = unit_images(given, "candidates")
    if tuple(images.shape[1:]) != tuple(observation.image_shape):
        raise ConfigError(
            f"candidates have shape {tuple(images.shape)}; expected (M, "
            f"{', '.join(map(str, observation.image_shape))}), as the observation's images"
        )
    return images


def _leading(attacks: list[Tried]) -> Tried | None:
    """Return the attack with the worst verdict, of several the one whose pictures explain the update best."""
    ran = [tried for tried in counted(attacks) if tried.reconstruction is not None]
    if not ran:
        return None
    verdict = worst([tried.finding for tried in ran])
    leading = [tried for tried in ran if tried.finding.verdict == verdict]
    return min(leading, key=lambda tried: math.inf if math.isnan(tried.distance) else tried.distance)


def _scope(subject: Subject, budget: float) -> dict[str, Number]:
    observation, model = subject.observation, subject.model
    return {
        "model": type(model).__name__,
        "trained numbers": sum(p.numel() for p in trainable_parameters(model).values()),
        "numbers sent": sum(t.numel() for t in observation.update.values()),
        "private inputs": observation.num_images,
        "shape of one": list(observation.image_shape),
        "client": words_of(observation.protocol),
        "mode": "training" if observation.training_mode else "evaluation",
        "buffers sent": bool(observation.buffers),
        "labels": "hidden" if observation.labels is None else "told",
        "truth given": subject.truth is not None,
        "candidates": len(subject.candidates),
        "threat model": "C, parameter-aware eavesdropper (Carletti et al. 2025): update, model and training "
        "are known; searches also know what photographs look like (D)",
        "invlib": __version__,
        "torch": torch.__version__,
        "processor": platform.machine(),
        "seed": subject.seed,
        "budget in seconds": budget,
    }


def _sentence(verdict: Verdict, subject: Subject, attacks: list[Tried], others: list[Finding]) -> str:
    """Say in a sentence what the report's verdict means for this update."""
    count = subject.observation.num_images
    kind = "token sequence" if subject.observation.is_text else "image"
    inputs, which = f"{kind}{'s' * (count > 1)}", f"all {count}" if count > 1 else "the"
    leading = _leading(attacks)
    numbers = {} if leading is None else leading.finding.numbers
    if verdict == "recovered and certified":
        return f"Whoever receives this update can compute {which} private {inputs} from it, with a proof."
    if verdict == "identified":
        return (
            f"An attack recovered {which} private {inputs} well enough to pick them out of "
            f"{numbers.get('candidates', 'the')} candidates."
        )
    if verdict == "probably recovered":
        return (
            f"An attack recovered {count} {inputs} whose update agrees with this one as no wrong picture's "
            "does: they are probably the private ones."
        )
    if verdict == "partly":
        part = numbers.get("certified") or numbers.get("identified") or numbers.get("tokens known")
        return f"An attack recovered a part ({part}) of the {count} private {inputs}."
    if verdict == "does not fit":
        reason = next(finding for finding in others if finding.verdict == verdict)
        return f"Such a client sends nothing like this of this model ({reason.name}): all else is void."
    if verdict == NOT_FOUND:
        return f"No attack within this budget recovered the private {inputs}; that proves no safety."
    return f"No attack of this version was run to its end on this update of {count} private {inputs}."


def _told(found: list[Finding]) -> str:
    told = [finding.name for finding in found if finding.verdict == "read off"]
    names = [name.lower() for name in told if name in _OF_THE_DATA]
    if not names:
        return "Nothing was read off it without a search."
    return f"Without any search it tells: {', '.join(names)}."


def _helped(defences: list[Finding]) -> str:
    names = ("Defences in place", "The training's noise")
    bounded = [f for f in defences if f.verdict == "bounded" and f.name in names]
    tried = [finding for finding in defences if finding.kind == "found by an attack"]
    yes = [finding.name for finding in tried if finding.verdict == "would help"]
    no = [finding.name for finding in defences if finding.verdict == "would not help"]
    said = [bounded[0].text.partition(". ")[0].rstrip(".") + "."] if bounded else []
    if yes:
        said.append(f"Against these attacks would help: {', '.join(yes).lower()}.")
    if part := [finding.name for finding in defences if finding.verdict == "partly"]:
        said.append(f"Would help in part: {', '.join(part).lower()}.")
    if no:
        said.append(f"Would not help: {', '.join(no).lower()}.")
    return " ".join(said) or "No defence is stated that bounds what an attacker finds, and none was tried."


def _pictures(subject: Subject, leading: Tried | None) -> dict[str, Tensor]:
    pictures = {}
    if leading is not None and leading.reconstruction is not None and not subject.observation.is_text:
        pictures["recovered"] = leading.reconstruction.images.detach().cpu()
    if subject.truth is not None and not subject.observation.is_text:
        pictures["private"] = subject.truth.detach().cpu()
    return pictures
