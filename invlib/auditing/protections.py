"""The defences of a report: those that are there and what they bound, and others, tried on this update."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from invlib.auditing.tried import Subject, Tried, attempts
from invlib.auditing.words import NOT_FOUND, Finding, Verdict, worst
from invlib.core.network import like, trainable_parameters
from invlib.core.observation import undefended
from invlib.defenses import (
    Clip,
    GaussianNoise,
    MaskLayer,
    TopK,
    Transform,
    defend,
    gaussian_mu,
    local_spectrum,
    noise_for,
    protection,
    reconstruction_bound,
    subsampled_bound,
    witness_pair,
)
from invlib.errors import ConfigError, DependencyError, DoubtWarning, InvlibError
from invlib.federated import FedSGD, observe
from invlib.metrics.report import matching_order
from invlib.settings import Checked, Count, Factor, Positive

KAPPAS = (0.1, 0.01, 0.001, 1e-6)  # how often somebody is right who does not see the update
GAMMA, KAPPA = 0.05, 0.01  # what noise is computed for: one in twenty, of a hundred candidates
ROUNDS = (1, 10, 100, 1000)
_FEWEST = 20  # evaluations of a search
_MORE = 7  # photographs beside each batch that a larger one is tried with
# What attacks found with a defence → how that is said, and what it says of the defence.
_ANSWERS: dict[Verdict, tuple[str, Verdict]] = {
    "partly": ("are recovered in part", "partly"),
    NOT_FOUND: (f"are {NOT_FOUND}", "would help"),
    "not tried": ("are out of reach: no attack applies", "would help"),
}
_FOUND = ("recovered and certified", "identified", "probably recovered")
_ENTRIES = 2**25  # of a Jacobian that is worth its time
_WITNESS = 40  # steps


@dataclass(frozen=True, kw_only=True)
class Noise(Checked):
    """The noise of a training under differential privacy, as its owner states it.

    Args:
        noise_multiplier: the standard deviation of the noise on a sum, over the clip of one example in it.
        rate: with what probability an example takes part in a step.
        steps: how many there are.
    """

    noise_multiplier: Positive
    rate: Factor = 1.0
    steps: Count = 1


def stated(privacy: Any) -> Noise | None:
    """Return what is stated of a training's noise.

    Args:
        privacy: a mapping with ``noise_multiplier``, ``rate`` and ``steps``, or an object with them, such as
            `invlib.integrations.opacus.Privacy`; None where nothing is.

    Raises:
        ConfigError: there is no noise multiplier, a name is unknown, or a value is out of range.
    """
    if privacy is None or isinstance(privacy, Noise):
        return privacy
    names = tuple(Noise.__dataclass_fields__)
    if isinstance(privacy, Mapping):
        if unknown := set(privacy) - set(names):
            raise ConfigError(f"privacy has {sorted(unknown)}; expected some of {', '.join(names)}")
        given = dict(privacy)
    else:
        given = {name: getattr(privacy, name) for name in names if getattr(privacy, name, None) is not None}
    if "noise_multiplier" not in given:
        raise ConfigError(f"privacy is {privacy!r}; expected one with a noise_multiplier")
    return Noise(**given)


def bounds(subject: Subject, privacy: Noise | None) -> Iterator[Finding]:
    """Yield what the defences that are there bound, for every attacker."""
    client, count = subject.observation.protocol, subject.observation.num_images
    transforms = getattr(client, "transforms", ())
    clients = getattr(undefended(client), "clients", None)
    if clients is not None:
        yield Finding(
            name="Secure aggregation",
            kind="bounded for everybody",
            verdict="nothing found",
            text=f"The update is the mean of {clients} clients', of {count} inputs in all. That hides which "
            "client one is of, and bounds nothing: what recovers a batch recovers those of all clients.",
        )
    if privacy is None and not transforms:
        yield Finding(
            name="Defences in place",
            kind="bounded for everybody",
            verdict="nothing found",
            text="The client states no clip and no noise, so that nothing bounds what an attacker may find.",
            advice="If it has some, say so: an attack that knows a defence is another attack.",
        )
        return
    if transforms:
        try:
            told = protection(client, count)
        except ConfigError as error:
            yield Finding(
                name="Defences in place",
                kind="bounded for everybody",
                verdict="nothing found",
                text=f"The client states {client!r}, which bounds nothing: {error}.",
                advice="A bound needs a clip, and Gaussian noise after it.",
            )
        else:
            yield _bounded(told.unit, told.noise_multiplier, repr(client))
    if privacy is not None:
        yield _trained(privacy)


def _bounded(unit: str, multiplier: float, words: str) -> Finding:
    """Say what a clip and noise bound, for full participation and one, ten, … rounds."""
    relation: Any = "replace one"
    table = {
        f"most successes at kappa {kappa:g}, {rounds} rounds": reconstruction_bound(
            kappa, gaussian_mu(multiplier, neighbours=relation, rounds=rounds)
        )
        for rounds in ROUNDS
        for kappa in KAPPAS
    }
    once = table[f"most successes at kappa {KAPPA:g}, 1 rounds"]
    often = table[f"most successes at kappa {KAPPA:g}, {ROUNDS[-1]} rounds"]
    return Finding(
        name="Defences in place",
        kind="bounded for everybody",
        verdict="bounded",
        text=(
            f"{words} protects {unit}, with noise {multiplier:.3g} times the clip. Whoever knows a hundred "
            f"candidates, one of them right, is right at most {once:.1%} of the time after one round "
            f"with it, and at most {often:.1%} after {ROUNDS[-1]} (neighbours: replace one; an average "
            "over what the record may be, and no statement about the whole data set)."
        ),
        numbers={"unit": unit, "noise multiplier": multiplier, "neighbours": relation, **table},
    )


def _trained(privacy: Noise) -> Finding:
    """Say what a training with sampling bounds for one example."""
    numbers: dict[str, Any] = {
        "unit": "one example",
        "noise multiplier": privacy.noise_multiplier,
        "rate": privacy.rate,
        "steps": privacy.steps,
        "neighbours": "add or remove one",
    }
    try:
        for kappa in KAPPAS:
            numbers[f"most successes at kappa {kappa:g}"] = (
                subsampled_bound(
                    kappa,
                    privacy.noise_multiplier,
                    rate=privacy.rate,
                    rounds=privacy.steps,
                    neighbours="add or remove one",
                )
                if privacy.rate < 1
                else reconstruction_bound(
                    kappa,
                    gaussian_mu(
                        privacy.noise_multiplier, neighbours="add or remove one", rounds=privacy.steps
                    ),
                )
            )
    except DependencyError as error:
        return Finding(
            name="The training's noise",
            kind="bounded for everybody",
            verdict="not tried",
            text=f"The bound with sampling was not computed: {error}.",
            numbers=numbers,
        )
    most = numbers[f"most successes at kappa {KAPPA:g}"]
    return Finding(
        name="The training's noise",
        kind="bounded for everybody",
        verdict="bounded",
        text=(
            f"As stated, noise of {privacy.noise_multiplier:g} times the clip of one example, a rate of "
            f"{privacy.rate:g} and {privacy.steps} steps: of a hundred candidates for one example, nobody "
            f"finds the right one more often than {most:.1%} (neighbours: add or remove one)."
        ),
        numbers=numbers,
        advice="It holds if what is stated is what runs; this report cannot see that.",
    )


def helps(subject: Subject, before: Tried, until: float) -> Iterator[Finding]:
    """Yield what defences would change, each tried on this update by the attacks that may spend time on it.

    Args:
        subject: its truth, or else what was recovered, is what a defended update is compared with.
        before: the attack that was best without.
        until: when to stop, of `time.perf_counter`.
    """
    result, observation = before.reconstruction, subject.observation
    if result is None or before.finding.verdict not in _FOUND:
        return
    if subject.truth is None:
        found = result.tokens if result.tokens is not None else result.images
        subject = replace(subject, truth=found, truth_is="what was recovered without")
    # An attacker who has the labels, whoever told them: what noise hides of them is not what is asked here.
    labels = observation.labels if observation.labels is not None else result.labels
    length = math.sqrt(sum(float(t.double().square().sum()) for t in observation.update.values()))
    numbers = sum(t.numel() for t in observation.update.values())
    multiplier = noise_for(GAMMA, KAPPA, neighbours="replace one")
    first = next(iter(observation.update)).rpartition(".")[0]
    yield Finding(
        name=f"Noise for a bound of {GAMMA:.0%}",
        kind="bounded for everybody",
        verdict="would help",
        text=(
            f"The update has length {length:.3g}. With a clip of that length, fixed before the data are "
            f"seen, and Gaussian noise of standard deviation {multiplier * length:.3g} on each number (one "
            f"round; {multiplier * math.sqrt(numbers):.3g} times the update's own length), nobody who has a "
            f"hundred candidates finds the right one more often than {GAMMA:.0%}. In {ROUNDS[2]} rounds it "
            f"has to be {math.sqrt(ROUNDS[2]):g} times as much."
        ),
        numbers={
            "length of the update": length,
            "noise multiplier": multiplier,
            "noise on each number": multiplier * length,
            "gamma": GAMMA,
            "kappa": KAPPA,
            "neighbours": "replace one",
            "unit": "one client",
        },
        advice="Noise on the mean of many clients protects each with less: let the aggregation add it.",
    )
    rms = length / math.sqrt(numbers)
    trials: list[tuple[str, tuple[Transform, ...]]] = [
        ("Clipping alone", (Clip(length / 2),)),
        ("Noise as large as the update's numbers", (GaussianNoise(rms),)),
        *([(f"Withholding {first}", (MaskLayer(first),))] if first else []),
        ("Sending the largest tenth of the numbers", (TopK(0.1),)),
        (f"The noise for {GAMMA:.0%}", (Clip(length), GaussianNoise(multiplier * length))),
    ]
    names = [name for name, _ in trials]
    subject, known = replace(subject, seeds=1), before
    afforded = _afforded(before, (until - time.perf_counter()) / (len(trials) + 2))
    if afforded < before.evaluations:
        # As many for the update as it is: a defence is not what makes a shorter search fail.
        subject = replace(subject, evaluations=afforded)
        known = _best_of(attempts(replace(subject, observation=replace(observation, labels=labels)), until))
    if known.finding.verdict not in _FOUND:
        why = "in the time that is left the attack fails without it, too"
        yield from (_untried(name, why) for name in names)
        return
    for k, (name, transforms) in enumerate(trials):
        left = until - time.perf_counter()
        if left <= 0:
            yield _untried(name, "the budget was spent")
            continue
        generator = torch.Generator().manual_seed(subject.seed)
        try:
            seen = replace(defend(observation, transforms, generator=generator), labels=labels)
        except InvlibError as error:
            yield _untried(name, str(error))
            continue
        share = time.perf_counter() + left / (len(trials) - k + 1)
        yield _compared(name, known, list(attempts(replace(subject, observation=seen), share)), transforms)
    if not observation.is_text:
        yield _larger(subject, known, until)


def _afforded(before: Tried, seconds: float) -> int:
    """Return how many evaluations of the best search there is time for, at most as many as it had."""
    result = before.reconstruction
    assert result is not None
    each = result.seconds / max(1, result.evaluations)
    return int(min(max(_FEWEST, seconds / max(each, 1e-6)), before.evaluations))


def _best_of(tried: Iterable[Tried]) -> Tried:
    ran = list(tried)
    verdict = worst([one.finding for one in ran])
    return next(one for one in ran if one.finding.verdict == verdict)


def _larger(subject: Subject, before: Tried, until: float) -> Finding:
    """Try the same client with photographs beside its images."""
    observation, name = subject.observation, f"A batch with {_MORE} images more"
    result, truth, labels = before.reconstruction, subject.truth, observation.labels
    assert result is not None
    assert truth is not None
    if labels is None and result.labels is not None:  # in the order of the result, and not of the truth
        labels = result.labels[matching_order(result.images, truth)]
    if time.perf_counter() >= until:
        return _untried(name, "the budget was spent")
    if labels is None or labels.is_floating_point() or getattr(observation.protocol, "batch_size", None):
        return _untried(name, "labels are not classes, or the client has minibatches of its own")
    images = torch.cat([truth, subject.candidates[:_MORE].to(truth)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoubtWarning)
        try:
            seen = observe(
                subject.model,
                images.to(like(subject.model)),
                torch.cat([labels.cpu(), torch.arange(_MORE) % (int(labels.max()) + 1)]),
                observation.protocol,
                normalization=observation.normalization,
                training_mode=observation.training_mode,
            )
        except InvlibError as error:
            return _untried(name, str(error))
    seen = replace(seen, labels=None if observation.labels is None else seen.labels)
    after = list(attempts(replace(subject, observation=seen, truth=images.to(truth)), until))
    return _compared(name, before, after, ())


def _untried(name: str, why: str) -> Finding:
    return Finding(name=name, kind="found by an attack", verdict="not tried", text=f"Not tried: {why}.")


def _compared(name: str, before: Tried, after: list[Tried], transforms: tuple[Transform, ...]) -> Finding:
    """Say whether what attacks find is less with a defence than without."""
    verdict = worst([tried.finding for tried in after])
    ran = [tried.finding for tried in after if tried.reconstruction is not None]
    leading = next((finding for finding in ran if finding.verdict == verdict), None)
    numbers: dict[str, Any] = {
        "defence": repr(list(transforms)),
        "before": before.finding.verdict,
        "after": verdict,
    }
    for when, finding in (("before", before.finding), ("after", leading)):
        for key in ("PSNR in dB", "identified"):
            if finding is not None and key in finding.numbers:
                numbers[f"{key}, {when}"] = finding.numbers[key]
    said, answer = _ANSWERS.get(verdict, (f"are still {verdict}", "would not help"))
    text = f"With it, and known to the attacker, the private inputs {said}."
    if leading is not None:
        text += f" {leading.text}"
    return Finding(
        name=name,
        kind="found by an attack",
        verdict=answer,
        text=text,
        numbers=numbers,
        advice="" if answer == "would not help" else "An attack that fails proves no safety; a bound does.",
    )


def diagnostics(subject: Subject, reference: Tensor | None, labels: Tensor | None) -> Iterator[Finding]:
    """Yield what can be said near one image: a pair that noise hides, and the local spectrum."""
    observation, model = subject.observation, subject.model
    if reference is None or labels is None or observation.is_text or observation.num_images > 1:
        return
    if labels.is_floating_point() or observation.training_mode:
        return
    reference, labels = reference.to(like(model)), labels.to(like(model).device)
    noise = float(getattr(observation.protocol, "noise", 0) or 0)
    client = undefended(observation.protocol)
    if noise and isinstance(client, FedSGD):
        pair = witness_pair(
            model,
            reference,
            labels,
            normalization=observation.normalization,
            others=subject.candidates,
            steps=_WITNESS,
        )
        most = pair.bound(noise)
        yield Finding(
            name="A picture that the noise hides",
            kind="cannot be told apart",
            verdict="bounded",
            text=(
                f"Another picture, {-20 * math.log10(pair.apart):.1f} dB away, has an update that is "
                f"{pair.relative:.2g} of this one's length from it. Whoever has to choose between the two is "
                f"right at most {most:.1%} of the time, of this pair alone."
            ),
            numbers={"distance": pair.distance, "relative": pair.relative, "noise": noise, "most": most},
        )
    size = sum(p.numel() for p in trainable_parameters(model).values()) * math.prod(observation.image_shape)
    largest = max(float(value.abs().max()) for value in observation.update.values())
    if isinstance(client, FedSGD) and size <= _ENTRIES and largest:
        dtype = next(iter(observation.update.values())).dtype
        level = noise or torch.finfo(dtype).eps * largest
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DoubtWarning)
            spectrum = local_spectrum(
                model, reference, labels, normalization=observation.normalization, noise=level
            )
        yield Finding(
            name="How the update changes near this image",
            kind="local diagnostic",
            verdict="read off",
            text=(
                f"{spectrum.rank} of {math.prod(observation.image_shape)} directions of the image change the "
                f"update by more than {'its noise' if noise else 'its rounding'}; a linear attacker near "
                f"here would reach {spectrum.expected_psnr:.1f} dB. It bounds nothing"
                + ("." if spectrum.smooth else ", the less since the gradient jumps (ReLU and the like).")
            ),
            numbers={"rank": spectrum.rank, "expected PSNR in dB": spectrum.expected_psnr, "noise": level},
        )
