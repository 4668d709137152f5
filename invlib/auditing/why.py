"""Why attacks failed on an update: the causes that a number proves, and what to try for each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.labels import contradiction, infer
from invlib.attacks.lastlayer import Head
from invlib.attacks.saturation import SATURATED, head_slopes, unsure
from invlib.attacks.verified import distance_of
from invlib.auditing.facts import (
    Foreign,
    Numbers,
    distorted,
    foreign,
    noise_of,
    numbers_of,
    precision,
    ranks,
    scale_free,
    softmax,
    steps_of,
)
from invlib.auditing.leaks import counted_steps
from invlib.auditing.words import Finding, Number, Verdict
from invlib.core.calls import logits_layer_inputs
from invlib.core.convert import as_images
from invlib.core.network import in_mode, like, tracks_statistics
from invlib.core.observation import Observation, undefended, words_of
from invlib.core.reconstruction import Reconstruction, in_digits
from invlib.errors import DoubtWarning, InvlibError, RecoveryError
from invlib.federated import FedAvg, FedSGD, observe

_SUCCESS = ("recovered and certified", "identified", "probably recovered")
_WEIGHTS = 0.9  # cosine of an update and the weights, from which on it is those
_ROUNDED = 1e-6  # distance of an update and the client's step on its own images that is rounding
_FAR = 1e-3  # share of a signal that the softmax leaves unexplained, from which on it is another model's
_EXPLAINS = 0.1  # of the distance as stated: what another client or mode has to leave to explain an update
_DOUBT = 0.3  # of a label, or of the update that labels have to explain, from which on they are unknown
_CLEAR = 8.0  # standard errors by which a cosine stands out from that of independent numbers
_NOISE = 0.01  # share of the squared length, from which on noise decides what a search finds


@dataclass(frozen=True, kw_only=True, eq=False)
class _Case:
    """What all checks look at."""

    model: nn.Module
    observation: Observation
    numbers: Numbers
    foreign: list[Foreign]
    eps: float
    tried: Sequence[Reconstruction]
    truth: tuple[Tensor, Tensor] | None

    @property
    def best_estimate(self) -> Foreign | None:
        """The most exact estimate of noise, where there is more than rounding, and it can be noise."""
        if self.numbers.sparse or self.numbers.quantised:
            return None
        return noise_of(self.foreign)

    def proves(self, finding: Finding) -> bool:
        """Say whether what a finding rests on is the client's, and not noise, rounding or what is missing."""
        if distorted(self.observation):
            return finding.name == "Local steps"
        rounded = self.numbers.sparse or self.numbers.quantised or self.best_estimate is not None
        return not rounded or finding.name not in ("Batch size", "Mode")

    @property
    def noise_share(self) -> float:
        """The share of the update's squared length that is noise, if each number has the same."""
        found, norm = self.best_estimate, self.numbers.norm
        return min(1.0, self.numbers.count * (found.sigma / norm) ** 2) if found and norm else 0.0


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
    case = _Case(
        model=model,
        observation=observation,
        numbers=numbers,
        foreign=foreign(model, observation, eps) if numbers.norm else [],
        eps=eps,
        tried=[one for item in tried if (one := getattr(item, "reconstruction", item)) is not None],
        truth=_with_labels(model, observation, truth),
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
            found += _at_the_truth(case, explained={finding.name for finding in found})
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


def _no_update(case: _Case) -> Iterator[Finding]:
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
        and not _of_the_truth(case)
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


def _of_the_truth(case: _Case) -> bool:
    """Say whether the update has more to do with the true images' than independent numbers would."""
    if case.truth is None:
        return False
    observation = replace(case.observation, protocol=undefended(case.observation.protocol))
    distance = _distance(case.model, observation, *case.truth)
    return distance is not None and 1 - distance > _CLEAR / math.sqrt(case.numbers.count)


def _saturation(case: _Case) -> Iterator[Finding]:
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


def _signs(case: _Case) -> Iterator[Finding]:
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


def _labels(case: _Case) -> Iterator[Finding]:
    if case.best_estimate is None and (said := contradiction(case.model, case.observation)):
        yield _finding("Labels", "does not fit", f"{said[0].upper()}{said[1:]}.", "Infer the labels.")


def _batch_size(case: _Case) -> Iterator[Finding]:
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


def _steps(case: _Case) -> Iterator[Finding]:
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


def _mode(case: _Case) -> Iterator[Finding]:
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


def _model(case: _Case) -> Iterator[Finding]:
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


def _noise(case: _Case) -> Iterator[Finding]:
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


def _coarse(case: _Case) -> Iterator[Finding]:
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


def _batch(case: _Case) -> Iterator[Finding]:
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


def _at_the_truth(case: _Case, explained: set[str]) -> Iterator[Finding]:
    """Compare the update with what the true images make, as stated, in variants, and with the results."""
    assert case.truth is not None
    observation = replace(case.observation, protocol=undefended(case.observation.protocol))
    images, labels = case.truth
    stated = _distance(case.model, observation, images, labels)
    if stated is None:
        return
    found = [
        (distance, result)
        for result in case.tried
        if result.images.shape == images.shape and result.labels is not None
        if (distance := _distance(case.model, observation, result.images, result.labels)) is not None
    ]
    reached = min((distance for distance, _ in found), default=None)
    # Noise is perpendicular to the gradient, so that 1 - cos is what its share of the length makes.
    share = max(case.noise_share, (case.eps / 2) ** 2 / 3)
    expected = max(_ROUNDED, 1 - math.sqrt(max(0.0, 1 - share)))
    shared: dict[str, Number] = {"truth": stated, "found": reached, "expected": expected}
    inputs = _inputs(observation)
    text = f"The true {inputs} are at a distance of {in_digits(stated)} (1 - cosine) from the update"
    text += f", and what was found at {in_digits(reached)}. " if reached is not None else ". "
    coarse = case.numbers.sparse or case.numbers.quantised or distorted(case.observation)
    if stated <= 2 * expected or coarse:
        lost = reached is not None and reached > 2 * stated + _ROUNDED
        alike = reached is not None and not lost and bool(explained)
        yield _at(
            "Search" if lost else "True text" if observation.is_text else "True image",
            "explains the failure" if lost else "read off",
            text
            + (
                "The search has not come to them."
                if lost
                else "Other images agree with the update as well as they do."
                if alike
                else "The stated client is the right one."
            ),
            "Give it more evaluations and restarts, or a start of another kind." if lost else "",
            **shared,
        )
        return
    variants = dict(_variants(case.model, observation, images, labels))
    shared |= {name: distance for name, (distance, _) in variants.items()}
    best = min(variants, key=lambda name: variants[name][0], default=None)
    if best is not None and variants[best][0] <= max(_EXPLAINS * stated, 2 * expected):
        distance, advice = variants[best]
        name = "Mode" if best.endswith("mode") else "Sign" if best.startswith("the opposite") else "Protocol"
        yield _at(
            name,
            "does not fit" if name == "Sign" else "explains the failure",
            f"{text}With {best} it is {in_digits(distance)}.",
            advice,
            **shared,
        )
    elif "Model" not in explained:
        yield _at(
            "Client",
            "does not fit" if case.foreign else "explains the failure",
            f"{text}{words_of(observation.protocol)} makes another update of the true {inputs}, and so do "
            f"{', '.join(variants) or 'no variants'}: the model, the labels or the client are others"
            + ("." if case.foreign else ", or there is noise, of which no layer tells."),
            "Take the weights of that round, and the client's own settings.",
            **shared,
        )


def _at(name: str, verdict: Verdict, text: str, advice: str, **numbers: Number) -> Finding:
    return Finding(
        name=name, kind="local diagnostic", verdict=verdict, text=text, advice=advice, numbers=numbers
    )


def _distance(model: nn.Module, observation: Observation, images: Tensor, labels: Tensor) -> float | None:
    """Return 1 - cosine of the update and what a client makes of images; None where it does not run."""
    try:
        if observation.is_text:
            return _of_tokens(model, observation, images, labels)
        known = replace(observation, labels=labels)
        distance = distance_of(model, known, observation.loss or F.cross_entropy)(images, labels)
    except (InvlibError, RuntimeError, ValueError):
        return None
    return distance if math.isfinite(distance) else None


def _of_tokens(model: nn.Module, observation: Observation, tokens: Tensor, labels: Tensor) -> float | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoubtWarning)
        made = observe(
            model,
            tokens,
            labels,
            observation.protocol,
            loss=observation.loss or F.cross_entropy,
            training_mode=observation.training_mode,
        )
    one, other = (
        torch.cat([update[name].detach().flatten().double().cpu() for name in observation.update])
        for update in (observation.update, made.update)
    )
    gap = float((one / one.norm() - other / other.norm()).square().sum() / 2)
    return gap if math.isfinite(gap) else None


def _inputs(observation: Observation) -> str:
    return "token sequence(s)" if observation.is_text else "image(s)"


def _variants(
    model: nn.Module, observation: Observation, images: Tensor, labels: Tensor
) -> Iterator[tuple[str, tuple[float, str]]]:
    """Yield what else the client may have been, its distance at the truth, and what to state then."""
    others: list[tuple[str, Observation, str]] = []
    if tracks_statistics(model):
        other = not observation.training_mode
        others.append(
            (
                f"{'training' if other else 'evaluation'} mode",
                replace(observation, training_mode=other),
                f"Attack again with training_mode={other}.",
            )
        )
    client = observation.protocol
    if isinstance(client, FedSGD):
        for steps, lr in ((2, 0.01), (5, 0.01), (10, 0.01), (5, 0.1)):
            other_client = FedAvg(lr=lr, local_steps=steps)
            others.append((f"{other_client}", replace(observation, protocol=other_client), ""))
    elif isinstance(client, FedAvg):
        others.append(("FedSGD()", replace(observation, protocol=FedSGD()), ""))
        if not isinstance(client.lr, tuple):
            for factor in (0.1, 10.0):
                others.append(
                    (
                        f"lr={client.lr * factor:g}",
                        replace(observation, protocol=replace(client, lr=client.lr * factor)),
                        "",
                    )
                )
        taken = len(client.batches(observation.num_images))
        for steps in sorted({1, 2, 5, 10, taken // 2, 2 * taken} - {0, taken}):
            other_client = replace(client, epochs=None, local_steps=steps)
            others.append((f"{steps} local step(s)", replace(observation, protocol=other_client), ""))
    turned = replace(observation, update={name: -value for name, value in observation.update.items()})
    others.append(
        ("the opposite sign", turned, "Send after minus before, or the gradient, and not its negative.")
    )
    for name, variant, advice in others:
        if (distance := _distance(model, variant, images, labels)) is not None:
            yield name, (distance, advice or f"State {name}.")


def _with_labels(
    model: nn.Module, observation: Observation, truth: Tensor | tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor] | None:
    """Return the true images or tokens with their labels; None where there are none, or they are unknown."""
    if truth is None:
        return None
    given = truth[0] if isinstance(truth, tuple) else truth
    images = given.to(like(model).device) if observation.is_text else as_images(given, like(model))
    if isinstance(truth, tuple):
        return images, truth[1]
    if tuple(images.shape) != (observation.num_images, *observation.image_shape):
        return None
    if observation.labels is not None:
        return images, observation.labels
    with suppress(InvlibError):
        if len(images) == 1:
            found = infer(model, observation)
            return None if found.guess and found.doubt > _DOUBT else (images, found.labels)
        return None if observation.is_text else (images, _assigned(model, observation, images))
    return None


def _assigned(model: nn.Module, observation: Observation, images: Tensor) -> Tensor:
    r"""Return the labels of several images by their features: :math:`P^\top A - N G = Y^\top A`."""
    head = Head.of(model, observation)
    rows = head.weight_of(observation, model)
    if rows is None:
        raise RecoveryError("the last layer's weight was not sent")
    with torch.no_grad(), in_mode(model, training=False):
        encoded = observation.normalization.encode(images)
        logits, features = logits_layer_inputs(model, encoded, training=observation.training_mode)
    features = features.double().cpu()
    wanted = logits.double().cpu().softmax(1).T @ features - len(images) * rows
    labels: Tensor = (wanted @ torch.linalg.pinv(features)).argmax(0)
    left = wanted - F.one_hot(labels, len(wanted)).to(wanted).T @ features
    if left.norm() > _DOUBT * len(images) * rows.norm():
        raise RecoveryError("the images' features do not explain the last layer's update with any labels")
    return labels.to(images.device)


def _nothing(case: _Case) -> Finding:
    """Say what was looked for in vain."""
    observation, inputs = case.observation, _inputs(case.observation)
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
