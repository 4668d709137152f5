"""Why attacks failed on an update: the causes that a number proves, and what to try for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.labels import contradiction
from invlib.attacks.saturation import SATURATED, head_slopes, unsure
from invlib.auditing.case import Case
from invlib.auditing.facts import (
    foreign,
    numbers_of,
    precision,
    ranks,
    scale_free,
    softmax,
    steps_of,
)
from invlib.auditing.leaks import counted_steps
from invlib.auditing.truth import at_the_truth, inputs_of, of_the_truth, truth_with_labels
from invlib.auditing.words import Finding, Number, Verdict
from invlib.core.observation import Observation, undefended
from invlib.core.reconstruction import in_digits
from invlib.errors import InvlibError
from invlib.federated import FedSGD

_SUCCESS = ("recovered and certified", "identified", "probably recovered")
_WEIGHTS = 0.9  # cosine of an update and the weights, from which on it is those
_FAR = 1e-3  # share of a signal that the softmax leaves unexplained, from which on it is another model's
_NOISE = 0.01  # share of the squared length, from which on noise decides what a search finds


def why(
    model: nn.Module,
    observation: Observation,
    tried: Sequence[Any] = (),
    truth: Tensor | tuple[Tensor, Tensor] | None = None,
) -> list[Finding]:
    """Diagnose why attacks failed on an update: each cause with the number that says so, and what to try.

    ``"does not fit"`` is said where a number proves that the stated client with this model cannot have sent
    the update, and ``"explains the failure"`` where a number shows what hides the images. Where neither is
    found, one finding says what was looked for.

    Args:
        model: the model that the client received; it is not changed.
        observation: what the server saw.
        tried: the attacks' results: each a `Reconstruction`, or something with the attributes ``finding`` and
            ``reconstruction``. Of a success nothing is explained, and only what does not fit is said.
        truth: the client's images ``(N, C, H, W)`` in [0, 1] or tokens ``(N, T)``, or a pair of them and the
            labels. The distance of what they make from the update is the most telling number.
    """
    try:
        if faults := observation.faults(model):
            return [
                _finding("Observation", "does not fit", "; ".join(faults) + ".", _CAPTURE, faults=faults[:16])
            ]
        model = observation.validate(model, text=None)
    except InvlibError as error:
        return [_finding("Observation", "does not fit", f"{error}.", _CAPTURE)]
    numbers = numbers_of(model, observation)
    eps = precision(observation, numbers)
    case = Case(
        model=model,
        observation=observation,
        numbers=numbers,
        foreign=foreign(model, observation, eps) if numbers.norm else [],
        eps=eps,
        tried=[one for item in tried if (one := getattr(item, "reconstruction", item)) is not None],
        truth=truth_with_labels(model, observation, truth),
    )
    found: list[Finding] = []
    for check in (_no_update, _saturation):  # what is left is about an update that says something
        found += check(case)
        if found:
            break
    else:
        for check in (_signs, _labels, _batch_size, _steps, _mode, _model, _noise, _coarse, _batch):
            with suppress(InvlibError):
                found += check(case)
        found = [finding for finding in found if finding.verdict != "does not fit" or case.proves(finding)]
    if case.truth is not None and numbers.norm:
        with suppress(InvlibError):
            found += at_the_truth(case, explained={finding.name for finding in found})
    if _succeeded(tried):
        found = [finding for finding in found if finding.verdict == "does not fit"]
    elif not any(finding.verdict in ("does not fit", "explains the failure") for finding in found):
        found.append(_nothing(case))
    return found


_CAPTURE = (
    "Record the update anew, with the model as the client received it (invlib.record_client, or "
    "invlib.from_state_dicts)."
)


def _finding(name: str, verdict: Verdict, text: str, advice: str = "", **numbers: Number) -> Finding:
    return Finding(
        name=name, kind="read off the update", verdict=verdict, text=text, advice=advice, numbers=numbers
    )


def _succeeded(tried: Sequence[Any]) -> bool:
    for item in tried:
        verdict = getattr(getattr(item, "finding", None), "verdict", None)
        certified = getattr(item, "certified", None)
        if verdict in _SUCCESS or (
            verdict is None and certified is not None and len(certified) and bool(certified.all())
        ):
            return True
    return False


def _no_update(case: Case) -> Iterator[Finding]:
    """Find what is no update at all: one number everywhere, weights, random numbers."""
    numbers, stated = case.numbers, getattr(case.observation.protocol, "noise", 0)
    if numbers.equal:
        yield _finding(
            "No update",
            "does not fit",
            f"All {numbers.count:,} numbers of the update are the same: no client's step makes that.",
            _CAPTURE,
            count=numbers.count,
        )
    elif numbers.along > _WEIGHTS:
        yield _finding(
            "No update",
            "does not fit",
            f"The update has a cosine of {numbers.along:.4f} with the model's weights, and is "
            f"{numbers.relative:.3g} times as long: the client's weights were sent, not their difference.",
            "Subtract the weights that the client received (invlib.from_state_dicts).",
            along=numbers.along,
            relative=numbers.relative,
        )
    elif (
        case.foreign
        and not (stated or numbers.sparse or numbers.quantised)
        and all(f.all_of_it for f in case.foreign)
        and not of_the_truth(case)
    ):
        first = case.foreign[0]
        yield _finding(
            "No update",
            "does not fit",
            f"The numbers cannot be told from independent random ones: in {first.layer!r} a client's "
            f"gradient obeys that {first.how}, and {first.share:.1%} of its squared length does not. "
            f"What is left stands out by {max(f.clear for f in case.foreign):.1f} standard errors. Either "
            "it is no update, or noise of which nothing was said covers all of it.",
            _CAPTURE,
            layer=first.layer,
            share=first.share,
            sigma=first.sigma,
            clear=[f.clear for f in case.foreign],
        )


def _saturation(case: Case) -> Iterator[Finding]:
    """Find a loss so small that its gradient is zero, or rounding."""
    observation = case.observation
    kind = next(iter(observation.update.values())).dtype
    if not case.numbers.norm:
        yield _finding(
            "Saturation",
            "explains the failure",
            f"The update is all zero, as of a loss that is exactly zero in {kind}: it says nothing about "
            "the images.",
            "Audit a round in which the model is not yet sure of the client's images.",
            norm=0.0,
        )
        return
    largest = max(float(value.abs().max()) for value in observation.update.values())
    slopes = head_slopes(case.model, observation)
    left = None if slopes is None else unsure(slopes)
    if largest < torch.finfo(kind).tiny or (
        left is not None and left <= SATURATED and case.best_estimate is None
    ):
        yield _finding(
            "Saturation",
            "explains the failure",
            "The model is all but sure of the labels: "
            + (f"one minus their probability is {left:.1e}" if left is not None else "its loss vanishes")
            + f", and the update's largest number is {largest:.1e}, so that rounding is much of it.",
            "Match log-odds (GradientMatching(log_odds=True)), or audit an earlier round.",
            unsure=left,
            largest=largest,
        )


def _signs(case: Case) -> Iterator[Finding]:
    """Hold the signs and the length of the logits' gradient against what cross-entropy can make."""
    observation = case.observation
    if case.best_estimate is not None or observation.loss not in (None, F.cross_entropy):
        return
    if not getattr(observation.protocol, "linear", True):
        return
    slopes = head_slopes(case.model, observation)
    if slopes is None or len(slopes) < 3 or not slopes.any():
        return
    alone = softmax(case.model, observation)
    if alone is not None and alone.rank_one <= _FAR < alone.gap and alone.label > -_FAR:
        return  # one image with a soft label
    floor = 1e-4 * float(slopes.abs().max())
    below, above = int((slopes < -floor).sum()), int((slopes > floor).sum())
    count, length = observation.num_images, float(slopes.clamp_min(0).sum())
    if below > count >= above:
        yield _finding(
            "Sign",
            "does not fit",
            f"{below} entries of the logits' gradient are negative and {above} positive; {count} image(s) "
            "make at most as many negative ones: the update's sign is turned round.",
            "Send after minus before for a weight difference, and the gradient itself for FedSGD.",
            negative=below,
            positive=above,
            images=count,
        )
    elif below > count:
        yield _finding(
            "Batch size",
            "does not fit",
            f"{below} entries of the logits' gradient are negative; {count} image(s) "
            "with a label each make at most as many.",
            "State how many images the client used, or its loss if that smooths labels.",
            negative=below,
            images=count,
        )
    elif length > 1.05 and not (case.numbers.sparse or case.numbers.quantised):
        yield _finding(
            "Scale",
            "does not fit",
            f"The positive entries of the logits' mean gradient add up to {length:.3g}; they are "
            "probabilities, 1 at most: the learning rate, the number of steps or the loss (a sum instead of "
            "a mean) is another than stated.",
            "State the client's loss and learning rate.",
            length=length,
        )


def _labels(case: Case) -> Iterator[Finding]:
    if case.best_estimate is None and (said := contradiction(case.model, case.observation)):
        yield _finding("Labels", "does not fit", f"{said[0].upper()}{said[1:]}.", "Infer the labels.")


def _batch_size(case: Case) -> Iterator[Finding]:
    for one in ranks(case.model, case.observation):
        if one.most < one.rank < one.limit:
            yield _finding(
                "Batch size",
                "does not fit",
                f"The update of {one.layer!r} has rank {one.rank} (singular values fall by {one.gap:.0e} "
                f"behind it); {case.observation.num_images} image(s) and {steps_of(case.observation)} local "
                f"step(s) make {one.most} at most.",
                "State how many images and steps there were.",
                rank=one.rank,
                most=one.most,
                gap=one.gap,
                layer=one.layer,
            )
            return


def _steps(case: Case) -> Iterator[Finding]:
    counted, stated = counted_steps(case.model, case.observation), steps_of(case.observation)
    if counted and counted != stated:
        yield _finding(
            "Local steps",
            "does not fit",
            f"Batch norm counted {counted} step(s), and {stated} were stated.",
            f"State {counted} local steps.",
            counted=counted,
            stated=stated,
        )


def _mode(case: Case) -> Iterator[Finding]:
    """Compare the stated mode with the one that weights before batch norm tell."""
    observation = case.observation
    if observation.is_text or (found := scale_free(case.model, observation)) is None:
        return
    blurred = case.best_estimate is not None or case.numbers.sparse or case.numbers.quantised
    if found.training is None or found.training == observation.training_mode or blurred:
        return
    true, stated = ("training", "evaluation") if found.training else ("evaluation", "training")
    yield _finding(
        "Mode",
        "explains the failure",
        f"The client ran batch norm in {true} mode, and {stated} mode was stated: the update of the "
        f"{found.layers} layer(s) before batch norm is aligned with their weights by {found.alignment:.1e}, "
        "where training mode makes 0 and evaluation mode about 1.",
        f"Attack again with training_mode={found.training}"
        + (", with the buffers that the client sent, if it did." if found.training else "."),
        alignment=found.alignment,
        training=found.training,
        stated=observation.training_mode,
    )


def _model(case: Case) -> Iterator[Finding]:
    """Hold one image's update of the last layer against the model's own last layer."""
    if case.best_estimate is not None or case.numbers.sparse or case.numbers.quantised:
        return
    found = softmax(case.model, case.observation)
    if found is None or found.negative > 1 >= found.positive:  # its sign is turned round
        return
    limit = max(_FAR, 100 * case.eps)
    if found.rank_one <= limit and found.gap > limit and found.label < -limit:
        yield _finding(
            "Model",
            "does not fit",
            f"The update of {found.layer!r} gives the features of the image and what the softmax made of "
            f"them; this model makes something else of these features, by {found.gap:.1%} of its length, and "
            f"no label mends that (it would have an entry of {found.label:.2g}). The update is of other "
            "weights: another model, or another round's.",
            "Take the weights that the client received in that round.",
            gap=found.gap,
            label=found.label,
            rank_one=found.rank_one,
            layer=found.layer,
        )


def _noise(case: Case) -> Iterator[Finding]:
    found, share = case.best_estimate, case.noise_share
    if found is None:
        return
    stated = float(getattr(case.observation.protocol, "noise", 0) or 0)
    yield _finding(
        "Noise",
        # tables of words are read off exactly or not at all
        "explains the failure" if share > _NOISE or case.observation.is_text else "read off",
        f"Noise with a standard deviation of {found.sigma:.2g}, give or take {found.error:.1%}, is in each "
        f"number, by {found.layer!r}: {found.how}. If it is the same everywhere, {share:.1%} of the update's "
        f"squared length is noise. " + (f"{stated:.2g} was stated." if stated else "None was stated."),
        "Average more rounds."
        if stated
        else f"State it, so that attacks weigh it: Defended(..., [GaussianNoise({found.sigma:.2g})]).",
        sigma=found.sigma,
        error=found.error,
        share=share,
        stated=stated,
        layer=found.layer,
    )


def _coarse(case: Case) -> Iterator[Finding]:
    """Find what was left out of the update, or rounded."""
    numbers, observation = case.numbers, case.observation
    stated = hasattr(observation.protocol, "release") or bool(observation.sent)
    plain = isinstance(undefended(observation.protocol), FedSGD)
    kept, size = 1 - numbers.zeros, observation.num_images * math.prod(observation.image_shape)
    if numbers.sparse or observation.sent:
        yield _finding(
            "Sparsity",
            "explains the failure",
            f"{kept:.1%} of the numbers were sent, {numbers.used:,} for {size:,} unknown ones of the "
            f"images; the smallest is {numbers.threshold:.2f} of their median.",
            "" if stated else f"State it, so that zeros are not matched: Defended(..., [TopK({kept:.3g})]).",
            zeros=numbers.zeros,
            used=numbers.used,
            unknowns=size,
            threshold=numbers.threshold,
        )
    if numbers.quantised:
        yield _finding(
            "Quantisation",
            "explains the failure",
            f"No tensor has more than {numbers.levels} magnitudes besides zero"
            + ("." if plain else ", of signs, bits, or of steps that are as small as the weights' rounding."),
            "" if stated else "State it: Defended(..., [Sign()]) or Defended(..., [Quantize(bits)]).",
            levels=numbers.levels,
        )
    elif numbers.grid is not None:
        yield _finding(
            "Precision",
            "read off",
            f"All numbers are {numbers.grid} ones, rounded by up to {case.eps / 2:.1e} of their size: "
            "searches bear that, and closed forms and certificates less.",
            f"State Defended(..., [Transport({numbers.grid!r})]).",
            grid=numbers.grid,
            eps=case.eps,
        )


def _batch(case: Case) -> Iterator[Finding]:
    """Count equations and unknowns."""
    observation, used = case.observation, case.numbers.used
    size = observation.num_images * math.prod(observation.image_shape)
    if not observation.is_text and size > used and not observation.sent and not case.numbers.sparse:
        yield _finding(
            "Batch",
            "explains the failure",
            f"The update has {used:,} numbers other than zero, and {observation.num_images} image(s) have "
            f"{size:,}: it does not determine them, and what is found rests on a prior.",
            "Attack clients with fewer images, or with a prior of such images.",
            equations=used,
            unknowns=size,
            images=observation.num_images,
        )


def _nothing(case: Case) -> Finding:
    """Say what was looked for in vain."""
    observation, inputs = case.observation, inputs_of(case.observation)
    identities = [f"of {f.layer!r} {f.how}" for f in case.foreign if not f.there]
    best = min((r for r in case.tried if math.isfinite(r.score)), key=lambda r: r.score, default=None)
    reached = f" The best result has a score of {in_digits(best.score)} ({best.objective})." if best else ""
    return _finding(
        "Causes",
        "nothing found",
        f"Nothing in the update contradicts the stated client, and nothing hides the {inputs}: "
        + (
            f"{' and '.join(identities)} to rounding, "
            if identities
            else "there is little noise, "
            if case.best_estimate is not None
            else "no layer tells of noise, "
        )
        + f"and {case.numbers.zeros:.1%} of its numbers are zero. What remains is the search itself, and "
        f"{observation.num_images} {inputs} in one update." + reached,
        f"Give the search a larger budget; give the true {inputs}, whose own distance tells whether "
        "the client's settings are right.",
        images=observation.num_images,
        score=best.score if best else None,
    )
