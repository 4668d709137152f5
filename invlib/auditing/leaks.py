"""What an update tells by itself: labels, counts, steps, tokens and its own history, without any search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from invlib.attacks import labels as inference
from invlib.attacks.buffers import buffers_alone
from invlib.attacks.certificate import layer_of
from invlib.attacks.chain import chain, sent
from invlib.attacks.layout import patch_step
from invlib.attacks.tokens import tables_of, tokens_used
from invlib.auditing.facts import (
    Numbers,
    distorted,
    foreign,
    noise_of,
    numbers_of,
    precision,
    ranks,
    scale_free,
    steps_of,
)
from invlib.auditing.words import Finding, Number, Verdict
from invlib.core.network import forward, in_mode, like, logits_of, tracks_statistics
from invlib.core.observation import Observation, undefended
from invlib.errors import InvlibError, RecoveryError

_SHOWN = 64  # labels, tokens and names that a finding lists at most
_DOUBTFUL = 0.5  # doubt from which on guessed labels are not told by the update
_SILENT = 0.02  # share of silent units from which on an activation has exact zeros


def leaks(model: nn.Module, observation: Observation) -> list[Finding]:
    """Return what an update gives away before any image is sought, one finding for each thing.

    Args:
        model: the model that the client received; it is not changed.
        observation: what the server saw.

    Raises:
        ObservationError: the observation does not fit the model.

    Source: ranks and counters as in this project's chapters; labels as in `invlib.labels.infer`.
    """
    model = observation.validate(model, text=None)
    numbers = numbers_of(model, observation)
    noise = [*_noise(model, observation, numbers)]
    exact = not (numbers.sparse or numbers.quantised or not numbers.norm or distorted(observation))
    exact &= all(finding.verdict == "nothing found" for finding in noise)
    found: list[Finding] = []
    for part in (_labels, _batch_size, _local_steps, _mode, _colours, _tokens):
        found += part(model, observation)
    if not exact:  # ranks and directions are then of the noise or the rounding, too
        found = [f for f in found if f.verdict != "does not fit" or f.name == "Local steps"]
    return [*found, *_readable(model, observation, exact), *_of_numbers(numbers), *noise]


def _finding(name: str, verdict: Verdict, text: str, advice: str = "", **numbers: Number) -> Finding:
    return Finding(
        name=name, kind="read off the update", verdict=verdict, text=text, numbers=numbers, advice=advice
    )


def _labels(model: nn.Module, observation: Observation) -> Iterator[Finding]:
    """Infer the labels whether they were told or not: what is told is known, what is inferred leaks."""
    try:
        found = inference.infer(model, observation)
    except InvlibError as error:
        yield _finding("Labels", "nothing found", f"No labels were read off the update: {error}.")
        return
    sure = None if found.confidence is None else [round(p, 4) for p in found.confidence.tolist()]
    hard = found.labels.ndim == 1 and not found.labels.is_floating_point()
    counts = {int(c): int(found.counts[c]) for c in found.counts.nonzero().flatten()}
    said = ", ".join(f"class {c}" + (f" ({n} times)" if n > 1 else "") for c, n in [*counts.items()][:_SHOWN])
    certain = (
        "certain"
        if not found.guess
        else f"a guess; the least certain is wrong with probability {found.doubt:.2f}"
        if sure is not None
        else f"a guess; doubt {found.doubt:.2f} of 1"
    )
    told = observation.labels
    agrees = None
    if hard and told is not None and told.ndim == 1 and not told.is_floating_point():
        agrees = bool(torch.equal(told.cpu().sort().values, found.labels.cpu().sort().values))
    inputs = "token sequences" if observation.is_text else "images"
    text = f"The update says which classes the client's {inputs} have: {said} ({certain}). By {found.method}."
    if agrees is not None:
        text += " They are those that were told." if agrees else " Others were told."
    if found.guess and found.doubt > _DOUBTFUL:
        text += " That is too doubtful to count."
    yield _finding(
        "Labels",
        "nothing found" if found.guess and found.doubt > _DOUBTFUL else "read off",
        text,
        labels=found.labels.flatten().tolist()[:_SHOWN],
        confidence=None if sure is None else sure[:_SHOWN],
        doubt=found.doubt,
        guess=found.guess,
        factor=found.factor,
        agrees=agrees,
    )


def _batch_size(model: nn.Module, observation: Observation) -> Iterator[Finding]:
    found = ranks(model, observation)
    # At its limit a rank says that there were as many, or more.
    shown = [r for r in found if r.rank < r.limit]
    if not shown:
        if not observation.is_text:
            yield _finding(
                "Batch size",
                "nothing found",
                "No fully connected layer has an update of low rank, which would count the images.",
                stated=observation.num_images,
            )
        return
    best = max(shown, key=lambda r: r.limit)
    count, steps = observation.num_images, steps_of(observation)
    text = (
        f"The update of {best.layer!r} has rank {best.rank} to rounding: its singular "
        f"values fall by a factor of {best.gap:.0e} after that many"
    )
    if best.rank > best.most:
        verdict: Verdict = "does not fit"
        text += f". {count} image(s) and {steps} local step(s), as stated, make {best.most} at most."
    else:
        verdict = "read off"
        text += (
            ": as many images, as was stated."
            if best.rank == count
            else f". {count} image(s) and {steps} local step(s) were stated; images that are alike, or whose "
            "units are silent, do not count."
            if best.rank < count or steps > 1
            else "."
        )
    yield _finding(
        "Batch size",
        verdict,
        text,
        rank=best.rank,
        most=best.most,
        gap=best.gap,
        layer=best.layer,
        stated=count,
        agrees=best.rank <= best.most,
        layers=[r.layer for r in shown],
        ranks=[r.rank for r in shown],
    )


def counted_steps(model: nn.Module, observation: Observation) -> int | None:
    """Return how many batches the client's batch-norm layers counted; None where no counter was sent."""
    own = dict(model.named_buffers())
    moved = [
        int(value) - int(own[name])
        for name, value in observation.buffers.items()
        if name.endswith("num_batches_tracked") and name in own
    ]
    return max(moved) if moved else None


def _local_steps(model: nn.Module, observation: Observation) -> Iterator[Finding]:
    if not tracks_statistics(model):
        return
    steps, stated = counted_steps(model, observation), steps_of(observation)
    if not steps:
        yield _finding(
            "Local steps",
            "nothing found",
            "No counter of a batch-norm layer that moved was sent."
            if steps is None
            else "The counters of batch norm that were sent did not move: evaluation mode, or old ones.",
            stated=stated,
        )
        return
    yield _finding(
        "Local steps",
        "read off" if steps == stated else "does not fit",
        f"The counters of batch norm moved by {steps}: the client took {steps} step(s) in training mode, "
        f"exactly. {stated} were stated.",
        steps=steps,
        stated=stated,
        agrees=steps == stated,
    )


def _mode(model: nn.Module, observation: Observation) -> Iterator[Finding]:
    if observation.is_text or (found := scale_free(model, observation)) is None or found.training is None:
        return
    mode = "training" if found.training else "evaluation"
    agrees = found.training == observation.training_mode
    yield _finding(
        "Mode of batch norm",
        "read off" if agrees else "does not fit",
        f"The client ran batch norm in {mode} mode: the update of the {found.layers} layer(s) before it is "
        f"aligned with their weights by {found.alignment:.1e}, where training mode makes 0 and evaluation "
        f"mode about 1. {'Training' if observation.training_mode else 'Evaluation'} mode was stated.",
        alignment=found.alignment,
        training=found.training,
        stated=observation.training_mode,
        agrees=agrees,
        layers=found.layers,
    )


def _colours(model: nn.Module, observation: Observation) -> Iterator[Finding]:
    if observation.is_text or not observation.training_mode or not tracks_statistics(model):
        return
    try:
        found = buffers_alone(model, observation)
    except InvlibError as error:
        yield _finding(
            "Batch statistics", "nothing found", f"The buffers say nothing of the images' colours: {error}."
        )
        return
    colour, off = ([round(v, 4) for v in t.tolist()] for t in (found.colour, found.deviation))
    yield _finding(
        "Batch statistics",
        "read off",
        f"The running statistics of {found.layer!r}, which were sent, say that the batch's mean colour is "
        f"{_listed(colour)}, give or take {_listed(off)}, and its contrast {found.contrast:.2f}. Noise on "
        "the update does not change that.",
        "Do not send buffers, or use group norm.",
        colour=colour,
        deviation=off,
        contrast=found.contrast,
        layer=found.layer,
    )


def _listed(values: list[float]) -> str:
    return ", ".join(f"{v:.3f}" for v in values)


def _tokens(model: nn.Module, observation: Observation) -> Iterator[Finding]:
    if not observation.is_text:
        return
    try:
        tables = tables_of(model, observation.image_shape[0])
        used = tokens_used(model, observation, tables)
        size = dict(model.named_parameters())[tables.tokens].shape[0]
        words = observation.in_words(used[:_SHOWN, None].cpu()) or tuple(map(str, used[:_SHOWN].tolist()))
        yield _finding(
            "Tokens",
            "read off",
            f"{len(used)} of {size} rows of {tables.tokens!r} moved, those of the tokens that the client's "
            f"text has: {', '.join(words)}{', …' if len(used) > _SHOWN else ''}.",
            used=len(used),
            vocabulary=size,
            tokens=used.tolist()[:_SHOWN],
        )
    except InvlibError as error:
        yield _finding("Tokens", "nothing found", f"The tokens were not read off a table: {error}.")
        return
    if tables.positions is None or tables.positions not in observation.update:
        return
    rows = sent(observation, tables.positions)
    rows = rows.reshape(-1, rows.shape[-1])[tables.rows]
    moved = rows.any(1).nonzero().flatten()
    if len(moved):
        yield _finding(
            "Longest sequence",
            "read off",
            f"{len(moved)} of {len(rows)} rows of {tables.positions!r} moved, up to place {int(moved[-1])}: "
            f"the longest sequence that left a trace has {int(moved[-1]) + 1} tokens.",
            length=int(moved[-1]) + 1,
            places=len(moved),
        )


def _readable(model: nn.Module, observation: Observation, exact: bool) -> Iterator[Finding]:
    """Say which layers hold images or text in closed form; the attacks read them."""
    ways: list[tuple[str, str]] = []
    tries: tuple[Callable[[nn.Module, Observation], tuple[str, str]], ...] = (
        (_tables,) if observation.is_text else (_first_layer, _sparse_layer, _patches, _layer_by_layer)
    )
    reasons = []
    for way in tries:
        try:
            ways.append(way(model, observation))
        except InvlibError as error:
            reasons.append(str(error))
    if ways:
        text = "In closed form, without a search: " + "; ".join(what for _, what in ways) + "."
        text += "" if exact else " But this update is none of one exact gradient."
    else:
        text = "No layer holds the client's data in closed form: " + "; ".join(reasons) + "."
    yield _finding(
        "Exactly readable layers",
        "read off" if ways and exact else "nothing found",
        text,
        exact=exact,
        attacks=[name for name, _ in ways],
        reasons=reasons,
    )


def _tables(model: nn.Module, observation: Observation) -> tuple[str, str]:
    tables = tables_of(model, observation.image_shape[0])
    if observation.num_images > 1 or tables.positions is None:
        raise RecoveryError("the tables of tokens and positions tell one sequence alone")
    return "token_embedding", f"{tables.tokens!r} and {tables.positions!r} give the tokens and their order"


def _first_layer(model: nn.Module, observation: Observation) -> tuple[str, str]:
    stages = chain(model, observation)
    if not stages.stages or stages.stages[0].window is not None:
        raise RecoveryError(stages.why or "the first layer is a convolution")
    name = stages.stages[0].name
    if observation.num_images > 1:
        raise RecoveryError(f"{name!r} sees the images, and sums over {observation.num_images} of them")
    return "fully_connected", f"{name!r} sees the image itself, and each of its rows is a multiple of it"


def _sparse_layer(model: nn.Module, observation: Observation) -> tuple[str, str]:
    layer = layer_of(model, observation, None)
    active = int(layer.weight_gradient.any(1).sum())
    most, count = min(active, layer.weight_gradient.shape[1]), observation.num_images
    if count >= most:
        raise RecoveryError(f"{count} images, and {most} active outputs or inputs of {layer.name!r}")
    name = f"{layer.name}.weight"
    shape = (1, *observation.image_shape)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(like(model))
    silent = _silent_units(model, noise, name)
    if silent < _SILENT:
        raise RecoveryError(f"{silent:.0%} of the units of {layer.name!r} are silent for an image")
    what = "images" if layer.image_of is not None else "features"
    return "exact_batch", f"{layer.name!r} has silent units, which separate the {what} of {count}"


def _silent_units(model: nn.Module, inputs: Tensor, name: str) -> float:
    """Return which share of a layer's rows have no gradient for a noise image."""
    own = dict(model.named_parameters())
    if name not in own:
        raise RecoveryError(f"{name!r} is no parameter")
    leaf = own[name].detach().clone().requires_grad_()
    with torch.enable_grad(), in_mode(model, training=False):
        output = logits_of(forward(model, {**own, name: leaf}, None, inputs))
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        rows = torch.autograd.grad((noise * output).sum(), leaf, allow_unused=True)[0]
    return 0.0 if rows is None else float((~rows.any(1)).double().mean())


def _patches(model: nn.Module, observation: Observation) -> tuple[str, str]:
    step = patch_step(model, observation.image_shape)
    count, width = len(step.pixels), step.weight_at.shape[0]
    if observation.num_images > 1 or count > width:
        raise RecoveryError(f"{observation.num_images} image(s), {count} patches and {width} equations each")
    return "patch_embedding", f"{step.weight!r} and {step.positions!r} give all {count} patches"


def _layer_by_layer(model: nn.Module, observation: Observation) -> tuple[str, str]:
    found = chain(model, observation)
    if found.why or observation.num_images > 1 or found.stages[0].window is None:
        raise RecoveryError(found.why or "undoing layers one by one is for one image behind convolutions")
    return "recursive_inversion", f"all {len(found.stages)} layers can be undone one by one, where they do"


def _of_numbers(numbers: Numbers) -> Iterator[Finding]:
    shown = ", ".join(repr(name) for name in numbers.empty[:5])
    yield _finding(
        "Zero tensors",
        "read off" if numbers.empty else "nothing found",
        f"{len(numbers.empty)} tensors of the update are all zero, unused or frozen: {shown}"
        f"{', …' if len(numbers.empty) > 5 else ''}."
        if numbers.empty
        else "No tensor of the update is all zero.",
        tensors=len(numbers.empty),
        names=list(numbers.empty[:_SHOWN]),
    )
    yield _finding(
        "Length",
        "read off",
        f"The update's length is {numbers.norm:.3g}, {numbers.relative:.2g} times that of the weights.",
        norm=numbers.norm,
        relative=numbers.relative,
        along=numbers.along,
    )
    if numbers.grid is not None and not numbers.quantised:
        yield _finding(
            "Precision",
            "read off",
            f"All {numbers.used:,} numbers are {numbers.grid} ones: the client computed or sent in it.",
            grid=numbers.grid,
            eps=torch.finfo(getattr(torch, numbers.grid)).eps,
        )
    if numbers.quantised:
        bits = math.log2(numbers.levels) + 1
        yield _finding(
            "Quantisation",
            "read off",
            f"No tensor has more than {numbers.levels} magnitudes besides zero, "
            + ("signs alone." if numbers.levels == 1 else f"about {bits:.1f} bits with the sign."),
            levels=numbers.levels,
            bits=bits,
        )
    yield _finding(
        "Sparsity",
        "read off" if numbers.sparse else "nothing found",
        f"{numbers.zeros:.1%} of the numbers are zero"
        + (
            f", and the smallest of the others is {numbers.threshold:.2f} of their median: the small ones "
            "were left out (top-k, or pruning)."
            if numbers.sparse
            else ", and small numbers are there: silent units at most."
        ),
        zeros=numbers.zeros,
        scattered=numbers.scattered,
        threshold=numbers.threshold,
    )


def _noise(model: nn.Module, observation: Observation, numbers: Numbers) -> Iterator[Finding]:
    stated = float(getattr(observation.protocol, "noise", 0) or 0)
    found = foreign(model, observation, precision(observation, numbers))
    if not found or numbers.sparse or numbers.quantised:
        return
    there = noise_of(found)
    best = there or min(found, key=lambda f: f.sigma / max(f.rounding, 1e-300))
    if there is None:
        text = f"No noise above rounding, {best.rounding:.1g} in each number: in {best.layer!r}, {best.how}."
    else:
        text = (
            f"There is noise in the update, with a standard deviation of {best.sigma:.2g}, give or take "
            f"{best.error:.1%}, if it is the same in each number: in {best.layer!r}, {best.how}, and "
            f"{best.share:.1%} of its squared length is not so."
        )
    if stated:
        text += f" {stated:.2g} was stated."
    yield _finding(
        "Noise",
        "nothing found" if there is None else "read off",
        text,
        sigma=best.sigma,
        error=best.error,
        share=best.share,
        rounding=best.rounding,
        stated=stated,
        layer=best.layer,
        estimates=[f.sigma for f in found],
        client=type(undefended(observation.protocol)).__name__,
    )
