"""The comparison of an update with what its true images make: as stated, in variants, beside the results."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.labels import infer
from invlib.attacks.lastlayer import Head
from invlib.attacks.verified import distance_of
from invlib.auditing.case import Case
from invlib.auditing.facts import distorted
from invlib.auditing.words import Finding, Number, Verdict
from invlib.core.calls import logits_layer_inputs
from invlib.core.convert import as_images
from invlib.core.network import in_mode, like, tracks_statistics
from invlib.core.observation import Observation, undefended, words_of
from invlib.core.reconstruction import in_digits
from invlib.errors import DoubtWarning, InvlibError, RecoveryError
from invlib.federated import FedAvg, FedSGD, observe

_ROUNDED = 1e-6  # distance of an update and the client's step on its own images that is rounding
_EXPLAINS = 0.1  # of the distance as stated: what another client or mode has to leave to explain an update
_DOUBT = 0.3  # of a label, or of the update that labels have to explain, from which on they are unknown
_CLEAR = 8.0  # standard errors by which a cosine stands out from that of independent numbers


def of_the_truth(case: Case) -> bool:
    """Say whether the update has more to do with the true images' than independent numbers would."""
    if case.truth is None:
        return False
    observation = replace(case.observation, protocol=undefended(case.observation.protocol))
    distance = _distance(case.model, observation, *case.truth)
    return distance is not None and 1 - distance > _CLEAR / math.sqrt(case.numbers.count)


def at_the_truth(case: Case, explained: set[str]) -> Iterator[Finding]:
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
    inputs = inputs_of(observation)
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


def inputs_of(observation: Observation) -> str:
    """Return the word for what a client trains on."""
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


def truth_with_labels(
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
